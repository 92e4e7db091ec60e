"""Small captioners with random weights, for tests."""

from pathlib import Path

import torch
import transformers

from sora_lightning.captioner import CoCa, VideoEncoder
from sora_lightning.layers.transformer import TransformerSize
from tests.conditioning.text_folders import words_tokenizer

CAPTIONS = ["a red circle moves left", "a blue square", "Ein grüner Kreis 🟢 rollt", "up"]


def coca(context=32, layout=None, streams=(), num_queries=3, **sizes):
    """A captioner whose every weight matters: nothing is zero, and no attention is uniform."""
    torch.manual_seed(0)
    encoder = VideoEncoder(TransformerSize(2, 32, 2), (2, 8, 8), layout, streams=streams)
    text = TransformerSize(2, 32, 2)
    model = CoCa(encoder, text, num_queries, vocab_size=300, context=context, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.bpe.train_on(CAPTIONS)
    return model.eval()


def clips(*sizes):
    rng = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=rng) * 2 - 1 for size in sizes]


TEMPLATE = (
    "{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}"
)
VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 16},
    **{"num_attention_heads": 2, "patch_size": 8, "projection_dim": 8},
}
TEXT = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.5},
}


def llava_folder(folder: Path) -> Path:
    """A LLaVA (arXiv 2304.08485) with random weights, as transformers writes it."""
    torch.manual_seed(0)
    tokenizer = words_tokenizer("<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(50)  # answers depend on the images
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder
