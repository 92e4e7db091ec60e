"""Record golden outputs from public repositories: ``python -m tests.interop.record CASE CLONE``.

``CLONE`` is a checkout of the case's repository; DiT, SiT and Latte need timm beside it. Weights
are seeded by name (``golden.py``), so a file holds inputs and outputs alone.
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch
from torch import Tensor, nn

from tests.interop.golden import save, seeded


def fill(model: nn.Module, tables: tuple[str, ...] = ()) -> nn.Module:
    """Seeded values for all weights but the tables that the model computes."""
    for name, weight in model.state_dict().items():
        if name not in tables:
            weight.copy_(seeded(name, weight.shape))
    return model.eval()


def uvit_label() -> None:
    """baofff/U-ViT, libs/uvit.py: labels, final convolution."""
    UViT = import_module("libs.uvit").UViT
    model = fill(
        UViT(
            img_size=8, patch_size=2, in_chans=4, embed_dim=32, depth=4, num_heads=2, num_classes=7
        )
    )
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 250.0, 1000.0]), torch.tensor([0, 6, 3])
    record("uvit_label", model, {"x": x, "t": t, "y": y}, model(x, t, y))


def uvit_text() -> None:
    """baofff/U-ViT, libs/uvit_t2i.py: 77 text tokens, no final convolution."""
    UViT = import_module("libs.uvit_t2i").UViT
    model = fill(
        UViT(
            img_size=8,
            patch_size=4,
            in_chans=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
            clip_dim=12,
            conv=False,
        )
    )
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([30.0, 999.0]), torch.randn(2, 77, 12)
    inputs = {"x": x, "t": t, "context": context}
    record("uvit_text", model, inputs, model(x, t, context))


def dit() -> None:
    """facebookresearch/DiT, models.py; time in its 1000 steps, label 5 is the class of none."""
    record_labelled("dit", import_module("models").DiT, torch.tensor([0, 500, 999]))


def sit() -> None:
    """willisma/SiT, models.py; its time is 0 at noise and 1 at data."""
    record_labelled("sit", import_module("models").SiT, torch.tensor([0.0, 0.4, 1.0]))


def record_labelled(case: str, network: type[nn.Module], t: Tensor) -> None:
    settings = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = fill(network(input_size=8, patch_size=2, in_channels=4, **settings), ("pos_embed",))
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 5, 3])
    record(case, model, {"x": x, "t": t, "y": y}, model(x, t, y), ("pos_embed",))


def latte() -> None:
    """Vchitect/Latte, models/latte.py, with labels (extras = 2)."""
    tables = ("pos_embed", "temp_embed")
    settings = {"hidden_size": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
    network = import_module("latte").Latte
    model = fill(
        network(input_size=8, patch_size=2, in_channels=4, num_frames=3, extras=2, **settings),
        tables,
    )
    x, t, y = torch.randn(2, 3, 4, 8, 8), torch.tensor([30, 999]), torch.tensor([5, 2])
    record("latte", model, {"x": x, "t": t, "y": y}, model(x, t, y), tables)


def record(
    case: str,
    model: nn.Module,
    inputs: dict[str, Tensor],
    output: Tensor,
    tables: tuple[str, ...] = (),
) -> None:
    save(case, model.state_dict(), tables, inputs, output)
    print(f"{case}: output {tuple(output.shape)}, root mean square {output.square().mean() ** 0.5}")


if __name__ == "__main__":
    case, clone = sys.argv[1:]
    sys.path[:0] = [clone, f"{clone}/models"]
    torch.manual_seed(0)
    with torch.no_grad():
        globals()[case]()
