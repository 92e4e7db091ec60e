import itertools
from functools import partial

import pytest
import torch

from sora_lightning.conditioning import GlobalEncoder
from sora_lightning.denoisers import DiT, DiTParts, UViT
from sora_lightning.denoisers.blocks import AdaLNBlock
from sora_lightning.denoisers.modulation import AdaLNTable, TiledTable
from sora_lightning.layers.partitions import Joint
from sora_lightning.layers.positions.absolute import Fractional, Learned, LearnedPositions
from sora_lightning.layers.positions.relative import RelativeSelfAttention
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems.optimizers.muon import NEWTON_SCHULZ, MuonAdamW, orthogonalise
from sora_lightning.systems.optimizers.parameters import parameter_groups
from sora_lightning.systems.optimizers.schedule import warmup_cosine
from sora_lightning.tokenizers.vivit_encoder import ViViT


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_singular_values_are_pulled_to_one_and_directions_kept(shape):
    matrix = torch.randn(shape)
    result = orthogonalise(matrix)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    aligned = u.mT @ result @ vh.mT
    assert (aligned - torch.diag(aligned.diag())).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(32, 32), (32, 40), (40, 32), (32, 96), (128, 32), (2, 32, 64)])
@pytest.mark.parametrize("log_condition", [0.0, 5.0, 15.0])
def test_every_shape_goes_through_the_plain_iteration(shape, log_condition):
    u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrices = (u * torch.linspace(0, -log_condition, s.shape[-1]).exp()) @ vh
    a, b, c = NEWTON_SCHULZ
    expected = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = expected @ expected.mT
        expected = a * expected + b * gram @ expected + c * gram @ gram @ expected
    result = orthogonalise(matrices.float())
    assert result.shape == shape
    assert (result - expected).norm() < 1e-3 * expected.norm()


def test_matrices_step_as_torch_muon_does():
    weights = [torch.nn.Parameter(torch.randn(12, 20)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    ours = MuonAdamW([weights[0]], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(
        [weights[1]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        gradient = torch.randn(12, 20)
        for weight in weights:
            weight.grad = gradient.clone()
        ours.step()
        theirs.step()
    # torch iterates in bfloat16, ours in float32 on the CPU.
    moved = (weights[0] - weights[1]).norm() / weights[1].norm()
    assert moved < 5e-3


def test_everything_else_steps_as_adamw():
    vectors = [torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    ours = MuonAdamW([vectors[0]], lr=0.01, betas=(0.8, 0.9))
    theirs = torch.optim.AdamW([vectors[1]], lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    for _ in range(5):
        gradient = torch.randn(7)
        for vector in vectors:
            vector.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(vectors[0], vectors[1])


def test_a_convolution_steps_as_its_flattened_matrix():
    convolution = torch.nn.Parameter(torch.randn(6, 4, 3, 3, 3))
    matrix = torch.nn.Parameter(convolution.data.flatten(1).clone())
    optimizers = [MuonAdamW([convolution], lr=0.1), MuonAdamW([matrix], lr=0.1)]
    gradient = torch.randn_like(convolution)
    convolution.grad, matrix.grad = gradient, gradient.flatten(1)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(convolution.flatten(1), matrix)


def test_groups_hold_each_trained_parameter_once_and_tables_stay_whole():
    module = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    )
    module[1].bias.requires_grad_(False)
    matrices, others = parameter_groups(module)
    assert [id(p) for p in matrices["params"]] == [id(module[1].weight)]
    assert {id(p) for p in others["params"]} == {
        id(module[0].weight),
        id(module[2].weight),
        id(module[2].bias),
    }
    assert others["weight_decay"] == 0


def test_learned_positions_and_other_tables_are_neither_decayed_nor_orthogonalised():
    parts = DiTParts(
        block=partial(AdaLNBlock, modulation=AdaLNTable, self_attention=RelativeSelfAttention),
        positions=[partial(Learned, grid=(2, 4, 4)), Fractional],
    )
    size = TransformerSize(1, 12, 2)
    tables = [
        (DiT(4, 12, size, parts=parts), ("positions.", "table")),
        (UViT(4, 12, size), ("position",)),
        (ViViT(size=size), ("position", "class_token")),
    ]
    for network, marks in tables:
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        matrices, others = (
            {names[id(p)] for p in group["params"]} for group in parameter_groups(network)
        )
        expected = {name for name in names.values() if any(mark in name for mark in marks)}
        assert expected
        assert expected <= others
        assert not expected & matrices
        assert all(name.endswith("weight") for name in matrices)


LEARNED = {
    "learned positions": lambda: Learned(24, [2, 3, 3]),
    "fractional positions": lambda: Fractional(24),
    "positions of U-ViT": lambda: LearnedPositions(2, 3, 3, 24),
    "adaLN table": lambda: AdaLNTable(24, 6),
    "tiled table": lambda: TiledTable(24, 2),
    "relative biases": lambda: RelativeSelfAttention(24, 2, Joint().schedule(1)[0][0]),
    "U-ViT": lambda: UViT(4, 8, TransformerSize(3, 24, 2)),
    "image tokens": lambda: GlobalEncoder(4, 8),
}


@pytest.mark.parametrize("name", LEARNED)
def test_only_weights_of_layers_are_decayed_and_orthogonalised(name):
    module = LEARNED[name]()
    matrices, others = parameter_groups(module)
    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    weights = [m.weight for m in module.modules() if isinstance(m, layers)]
    assert {id(p) for p in matrices["params"]} == {id(weight) for weight in weights}
    assert len(matrices["params"]) + len(others["params"]) == len(list(module.parameters()))
    tables = [p for p in others["params"] if p.ndim >= 2]
    assert tables
    assert others["weight_decay"] == 0


def test_small_singular_values_stay_small_and_all_others_end_near_one():
    """The docstring's bound holds, for a square Gaussian matrix too."""
    torch.manual_seed(0)
    values = torch.logspace(0, -4, 64)
    u, _, vh = torch.linalg.svd(torch.randn(64, 64))
    for matrix in (u * values @ vh, torch.randn(64, 64)):
        u, before, vh = torch.linalg.svd(matrix)
        after = torch.diag(u.mT @ orthogonalise(matrix) @ vh.mT)
        large = before > before.norm() / 500
        assert after[large].min() > 0.68
        assert after.max() < 1.21
        ratio = before[~large] / before.norm()
        assert (after[~large] < 1.05 * 3.4445**5 * ratio).all()


def test_rates_warm_up_and_end_at_the_floor():
    factors = [warmup_cosine(step, 10, 100) for step in range(101)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1
    assert factors[100] == pytest.approx(0.02)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("arguments", [{"lr": 0.0}, {"momentum": 1.0}])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MuonAdamW([torch.nn.Parameter(torch.ones(2))], **arguments)
