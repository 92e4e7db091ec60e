"""Training on packs: each clip counts alike wherever it stands, ranks without clips hold nothing
up, and a training resumes to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from sora_lightning.conditioning import TextConditioner
from sora_lightning.denoisers import DiT
from sora_lightning.diffusion import SquaredError
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem, TokenizerSystem
from sora_lightning.systems.draws import GroupDraws, make_rng
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import PackedBatch
from tests.systems.test_systems import assert_same_weights

PACKED = {
    "packing": {
        "tokens": 40,
        "compression": "2x8x8",
        "max_frames": 5,
        "max_pixels": 24 * 24,
        "patch": [1, 1, 1],
    },
    "batching": {"sizes": None, "pixels_per_batch": None, "run_length": 2},
}


@pytest.fixture
def system() -> DiffusionSystem:
    tokenizer = ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1)
    one = DiffusionSystem(
        tokenizer,
        TextConditioner(width=16, depth=1, num_heads=2),
        lambda channels, width: DiT(channels, width, TransformerSize(2, 24, 2), patch=(1, 1, 1)),
        drop_condition=0.5,
    )
    for parameter in one.parameters():  # zero-initialised gates would hide half of the gradients
        parameter.data.normal_(std=0.1)
    return one


def losses_of(system: DiffusionSystem | TokenizerSystem, batch: PackedBatch) -> Tensor:
    rng = GroupDraws.of_clips(batch, system.seed, system.device)
    if isinstance(system, DiffusionSystem):
        return system.losses(batch, rng)
    return torch.stack([system.loss(*clip)[0] for clip in system.reconstructions(batch, rng)])


def batch_of(indices: list[int]) -> PackedBatch:
    """Clips of several sizes, each the same in whichever batch it stands."""
    sizes = [(5, 16, 16), (1, 24, 16), (3, 16, 24), (5, 16, 16), (1, 8, 8)]
    draws = [torch.Generator().manual_seed(i) for i in indices]
    videos = [torch.rand(3, *sizes[i], generator=g) for i, g in zip(indices, draws, strict=True)]
    names = [f"{i:016x}" for i in indices]
    captions = [f"clip {i}" for i in indices]
    return PackedBatch(captions, 8.0, names, [i % 3 for i in indices], 0.5, videos=videos)


class Ranks:
    """Stands in for the trainer of several ranks, of which the caller runs one after the other."""

    def __init__(self, counts: list[int]) -> None:
        self.world_size = len(counts)
        self.mean = sum(counts) / len(counts)
        self.strategy = self

    def reduce(self, value: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "mean"
        return torch.full_like(value, self.mean)


def gradients(
    system: L.LightningModule, batches: list[PackedBatch], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Return the mean of the ranks' gradients, by which they would step."""
    ranks = Ranks([len(batch) for batch in batches])
    monkeypatch.setattr(type(system), "trainer", ranks)
    monkeypatch.setattr(type(system), "log", lambda *_, **__: None)
    system.zero_grad()
    for batch in batches:
        (system.training_step(batch, 0) / len(batches)).backward()
    return {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}


def test_a_packed_loss_is_that_of_the_clips_alone(system: DiffusionSystem) -> None:
    batch = batch_of([0, 1, 2, 3, 4])
    together = losses_of(system, batch)
    assert together.shape == (5,)
    for i in range(5):
        draw = make_rng(system.device, system.seed, i, i % 3)
        dropped = torch.rand(1, generator=draw) < system.drop_condition
        t = system.time(torch.randn(1, generator=draw))
        x_0 = system.tokenizer.encode(batch.videos[i][None])
        noise = torch.randn(x_0.shape, generator=draw)
        condition = system.conditioner([batch.captions[i]], dropped)
        alone = SquaredError()(system.denoiser, x_0, noise, t, condition)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_clip_with_dropped_tokens_is_noised_like_the_whole_and_asked_for_the_rest(
    system: DiffusionSystem,
) -> None:
    """Dropped tokens decide neither times nor noise, and their values do not matter. A pack of
    clips gives the losses of the clips alone.
    """
    batch = batch_of([0, 1, 2, 3, 4])
    x_0 = [system.tokenizer.encode(video[None])[0] for video in batch.videos or []]
    grids = [system.denoiser.patch.grid(*x.shape[1:]) for x in x_0]
    kept = [torch.randperm(g.num_tokens)[: (g.num_tokens + 1) // 2].sort()[0] for g in grids]
    dropped = replace(batch, videos=None, latents=x_0, kept=kept)
    losses = losses_of(system, dropped)
    everything = [torch.arange(grid.num_tokens) for grid in grids]
    whole = losses_of(system, replace(dropped, kept=everything))
    torch.testing.assert_close(whole, losses_of(system, batch), atol=1e-5, rtol=1e-5)
    assert (losses - whole)[:4].abs().min() > 1e-4
    assert torch.equal(losses[4], whole[4])  # one token, which is kept
    other = []
    for x, tokens in zip(x_0, kept, strict=True):
        seen = torch.zeros(x[0].numel(), dtype=torch.bool)
        seen[tokens] = True
        other.append(torch.where(seen.view(x.shape[1:]), x, torch.randn_like(x)))
    assert torch.equal(losses, losses_of(system, replace(dropped, latents=other)))
    for i in range(5):
        alone = replace(batch_of([i]), videos=None, latents=[x_0[i]], kept=[kept[i]])
        torch.testing.assert_close(losses_of(system, alone)[0], losses[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deal", [[[0, 1], [2, 3, 4]], [[4], [3, 2, 1, 0]], [[], [0, 1, 2, 3, 4]]])
def test_every_clip_counts_alike_on_whichever_rank(
    deal: list[list[int]], system: DiffusionSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = gradients(system, [batch_of([0, 1, 2, 3, 4])], monkeypatch)
    shared = gradients(deepcopy(system), [batch_of(indices) for indices in deal], monkeypatch)
    assert alone.keys() == shared.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in alone.values())
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-5, rtol=1e-5)


def test_a_pack_without_clips_costs_nothing_but_reaches_every_parameter(
    system: DiffusionSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = gradients(system, [batch_of([])], monkeypatch)
    trained = {name for name, p in system.named_parameters() if p.requires_grad}
    assert reached.keys() == trained
    assert all(not gradient.any() for gradient in reached.values())


DROPPING = {
    "class_path": "sora_lightning.data.batching.native_sizes.BetaDropping",
    "init_args": {"mean": 0.5, "largest": 0.9},
}


@pytest.mark.parametrize(
    "dropping",
    [
        pytest.param(None, id="whole"),
        pytest.param(DROPPING, id="dropping", marks=pytest.mark.slow),
    ],
)
def test_a_packed_training_resumes_to_the_bit(
    dropping: dict | None,
    fit: Callable,
    diffusion_model: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Sums over fewer threads, with a core left to each worker, would differ in their last bits.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    packed = {**PACKED, "packing": PACKED["packing"] | {"dropping": dropping}}  # type: ignore[operator]
    config = {"model": diffusion_model, "data": packed}
    steps = ("--trainer.max_steps", "6")
    whole = fit(config, tmp_path / "whole", *steps, "--checkpoint.keep_every_n_steps", "2")
    middle = whole.parent / "step-00000002.ckpt"
    workers = ("--data.reading.num_workers", "2")
    resumed = fit(config, tmp_path / "resumed", *steps, *workers, "--ckpt_path", str(middle))
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compression": "4x8x8"}, "data.packing: compression = 4x8x8: the tokenizer's is 2x8x8"),
        ({"patch": [1, 2, 2]}, r"data.packing: patch = \[1, 2, 2\]: the denoiser's is \[1, 1, 1\]"),
    ],
)
def test_packs_counted_in_other_tokens_are_refused(
    wrong: dict, message: str, fit: Callable, diffusion_model: dict, tmp_path: Path
) -> None:
    data = {**PACKED, "packing": PACKED["packing"] | wrong}  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        fit({"model": diffusion_model, "data": data}, tmp_path / "run")


def test_a_network_that_needs_every_token_is_refused(
    fit: Callable, diffusion_model: dict, tmp_path: Path
) -> None:
    u_vit = {
        "class_path": "sora_lightning.denoisers.UViT",
        "init_args": {
            "size": {"depth": 3, "width": 24, "num_heads": 2},
            "extent": {"condition": 0},
            "patch": [1, 1, 1],
        },
    }
    arguments = diffusion_model["init_args"] | {"denoiser": u_vit}
    model = {**diffusion_model, "init_args": arguments}
    data = {**PACKED, "packing": PACKED["packing"] | {"dropping": DROPPING}}  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"dropping is set: a UViT cannot do without"):
        fit({"model": model, "data": data}, tmp_path / "run")


def test_convolutions_do_not_train_on_packs(
    fit: Callable, tokenizer_model: dict, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"data\.packing is set: a ConvTokenizer trains on"):
        fit({"model": tokenizer_model, "data": PACKED}, tmp_path / "run")


@pytest.mark.parametrize(
    "packed",
    [pytest.param(False, marks=pytest.mark.slow, id="dense"), pytest.param(True, id="packed")],
)
def test_training_from_the_cache_is_training_from_the_pixels(
    packed: bool,
    fit: Callable,
    tokenizer_model: dict,
    diffusion_model: dict,
    tokenizer_checkpoint: Path,
    tmp_path: Path,
) -> None:
    """The losses of every step, in float32 and with the posterior's mean."""
    sizes = PACKED if packed else {}
    encode = ("--ckpt_path", str(tokenizer_checkpoint), "--latents.dtype", "float32")
    windows = "--data.batching.windows_per_clip=2"
    run_dir = tmp_path / "encoded"
    fit({"model": tokenizer_model, "data": sizes}, run_dir, windows, *encode, command="predict")
    cached = f"--data.latents={run_dir / 'latents'}"
    losses = []
    for name, source in (("pixels", "--data.batching.fixed_windows=true"), ("cached", cached)):
        options = (windows, source, "--trainer.logger=true", "--trainer.log_every_n_steps=1")
        config = {"model": diffusion_model, "data": sizes}
        fit(config, tmp_path / name, "--trainer.max_steps=6", *options)
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        losses.append([event.value for event in events.Scalars("train/loss")])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
