"""Small captioners with random weights, for tests."""

import torch

from sora_lightning.captioner import CoCa, VideoEncoder
from sora_lightning.layers.transformer import TransformerSize

CAPTIONS = ["a red circle moves left", "a blue square", "Ein grüner Kreis 🟢 rollt", "up"]


def coca(context=32, layout=None, **sizes):
    """A captioner whose every weight matters: nothing is zero, and no attention is uniform."""
    torch.manual_seed(0)
    encoder = VideoEncoder(TransformerSize(2, 32, 2), (2, 8, 8), layout)
    model = CoCa(
        encoder, TransformerSize(2, 32, 2), num_queries=3, vocab_size=300, context=context, **sizes
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.bpe.train_on(CAPTIONS)
    return model.eval()


def clips(*sizes):
    rng = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=rng) * 2 - 1 for size in sizes]
