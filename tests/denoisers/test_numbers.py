"""Parameters and multiply-accumulates of the papers' models, counted on the meta device.

The DiT paper's "Gflops" are multiply-accumulates of one forward pass of one clip; the finer numbers
below are those of its public code under the same counter.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sora_lightning.conditioning import LabelConditioner
from sora_lightning.denoisers import SIZES, DiT, DiTParts, image_dit, latte
from sora_lightning.denoisers.blocks import (
    AdaLNBlock,
)
from sora_lightning.denoisers.conditioning_variants import (
    CrossAttentionDiT,
    InContextDiT,
    PlainBlock,
    UngatedAdaLNBlock,
)
from sora_lightning.denoisers.conditions import NoCondition, PooledOnly
from sora_lightning.denoisers.modulation import AdaLN, AdaLNLoRA
from sora_lightning.layers.partitions import Joint, Windows
from sora_lightning.layers.positions.absolute import Learned, SinusoidalPlane
from sora_lightning.layers.positions.relative import RelativeSelfAttention
from sora_lightning.types import Condition

_CLASSES = [str(i) for i in range(1000)]


def num_trained(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def giga_macs(dit, width, extent, channels=4):
    """Multiply-accumulates of one forward pass of one clip."""
    x = torch.empty(1, channels, *extent, device="meta")
    mask = torch.empty(1, 1, dtype=torch.bool, device="meta")
    tokens, pooled = (torch.empty(1, *rest, width, device="meta") for rest in ((1,), ()))
    with FlopCounterMode(display=False) as counter:
        dit(x, torch.empty(1, device="meta"), Condition(tokens, mask, pooled))
    return counter.get_total_flops() / 2e9


def labelled(size, patch, **kwargs):
    width = SIZES[size].width
    with torch.device("meta"):
        return image_dit(4, width, size, patch, **kwargs), LabelConditioner(_CLASSES, width)


# size, patch, side of the latents, public code's GMAC, all parameters that its code counts
_DIT = [
    ("S", 8, 32, 0.358, 33_148_160),
    ("S", 4, 32, 1.413, 32_945_024),
    ("S", 2, 32, 6.056, 32_963_360),
    ("B", 8, 32, 1.418, 130_881_536),
    ("B", 4, 32, 5.565, 130_475_648),
    ("B", 2, 32, 23.005, 130_512_416),
    ("L", 8, 32, 5.011, 458_594_816),
    ("L", 4, 32, 19.696, 458_053_760),
    ("L", 2, 32, 80.698, 458_102_816),
    ("XL", 8, 32, 7.392, 675_683_072),
    ("XL", 4, 32, 29.044, 675_074_432),
    ("XL", 2, 32, 118.621, 675_129_632),
    ("XL", 2, 64, 524.538, 676_014_368),
]


@pytest.mark.parametrize(("size", "patch", "side", "macs", "parameters"), _DIT)
def test_dit_has_the_published_parameters_and_cost(size, patch, side, macs, parameters):
    dit, label = labelled(size, patch)
    # The public code keeps its fixed table of positions as a parameter that does not train.
    table = (side // patch) ** 2 * SIZES[size].width
    assert num_trained(dit, label) + table == parameters
    # The finer numbers are printed to three decimals, half of one of which is 0.14 % of S/8.
    counted = giga_macs(dit, SIZES[size].width, (1, side, side))
    assert counted == pytest.approx(macs, rel=1e-3, abs=5e-4)


def test_dit_xl_trains_as_many_parameters_as_published():
    assert num_trained(*labelled("XL", 2)) == 674_834_720


# block, GMAC and million trained parameters: arXiv 2212.09748, figure 5 and table 4
@pytest.mark.parametrize(
    ("network", "block", "macs", "millions"),
    [
        (InContextDiT, PlainBlock, 119.37, 449),
        (CrossAttentionDiT, PlainBlock, 137.62, 598),
        (DiT, UngatedAdaLNBlock, 118.56, 600),
        (DiT, AdaLNBlock, 118.64, 675),
    ],
    ids=["in-context", "cross-attention", "adaLN", "adaLN-Zero"],
)
def test_block_variants_have_the_published_cost(network, block, macs, millions):
    parts = DiTParts(partial(block, qk_norm=None), PooledOnly, [SinusoidalPlane], rotary=None)
    with torch.device("meta"):
        dit = network(4, 1152, "XL", parts=parts, learned_sigma=True)
        label = LabelConditioner(_CLASSES, 1152)
    assert giga_macs(dit, 1152, (1, 32, 32)) == pytest.approx(macs, rel=1e-3)
    assert num_trained(dit, label) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_latte_trains_as_many_parameters_as_published():
    with torch.device("meta"):
        model = latte(4, 1152)
    assert num_trained(model) == 673_681_568
    # The public code repeats each modulation for every frame or every position that a block or the
    # final layer takes as a batch, 1893.0 GMAC in all; here a clip has each of them once.
    frames, positions = 16, 256
    repeats = 14 * 6 * (frames - 1 + positions - 1) + 2 * (frames - 1)
    counted = giga_macs(model, 1152, (16, 32, 32)) + repeats * 1152**2 / 1e9
    assert counted == pytest.approx(1893.0, rel=1e-3)


def walt(size, modulation):
    """W.A.L.T on 17 x 128 x 128 video, 5 x 16 x 16 latents of 8 channels, patch 1, without text."""
    parts = DiTParts(
        block=partial(AdaLNBlock, modulation=modulation, self_attention=RelativeSelfAttention),
        condition=NoCondition,
        positions=[partial(Learned, grid=(5, 16, 16))],
        rotary=None,
    )
    layout = Windows([[1, 16, 16], [5, 8, 8]])
    with torch.device("meta"):
        return DiT(8, 1, size, (1, 1, 1), layout=layout, parts=parts, self_conditioning=True)


# size, rank of the correction, million parameters: arXiv 2312.06662, tables 3 and 6
@pytest.mark.parametrize(
    ("size", "modulation", "millions"),
    [("L", partial(AdaLNLoRA, rank=r), m) for r, m in
     ((2, 313), (4, 314), (16, 316), (64, 324), (256, 357))]
    + [("L", AdaLN, 458), ("XL", partial(AdaLNLoRA, rank=2), 460)],
)  # fmt: skip
def test_walt_has_the_published_parameters(size, modulation, millions):
    assert num_trained(walt(size, modulation)) / 1e6 == pytest.approx(millions, rel=0.02)


def test_low_rank_modulation_saves_what_walt_says_it_saves():
    """475 M of ViT-g (40 blocks of width 1408) become 12 M: arXiv 2312.06662, section 3.3."""
    with torch.device("meta"):
        full = 40 * num_trained(AdaLN(1408, 6))
        low = 40 * num_trained(AdaLNLoRA(1408, 6, rank=2)) + num_trained(nn.Linear(1408, 6 * 1408))
    assert full / 1e6 == pytest.approx(475, rel=0.02)
    assert low / 1e6 == pytest.approx(12.66, rel=0.02)


def test_billions_are_counted_without_memory():
    with torch.device("meta"):
        model = DiT(16, 4096, "3B", layout=Joint(), parts=DiTParts(condition=NoCondition))
    d, depth = 2304, 52
    assert num_trained(model) == pytest.approx(depth * (12 + 6) * d**2, rel=0.01)
    assert giga_macs(model, 4096, (5, 16, 16), channels=16) > 1000


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_the_table_builds(size):
    with torch.device("meta"):
        assert isinstance(DiT(4, 8, size), DiT)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="size = 'XXL': the sizes are tiny, S, B, L, XL, 3B"):
        DiT(4, 8, "XXL")
