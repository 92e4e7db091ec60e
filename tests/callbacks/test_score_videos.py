"""Scores while a model trains do not disturb it, and do not depend on how many ranks there are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from evaluation.features import TinyFile
from evaluation.metrics import ClipScore, FrechetVideoDistance, Motion
from sora_lightning.callbacks.metrics import ScoreVideos
from sora_lightning.cli.training import run_training
from sora_lightning.data.synthetic.render import write_dataset
from sora_lightning.generation import seeded_noise
from sora_lightning.types import TokenGrid, VideoBatch, as_levels

PROMPTS = [f"a red circle moves left {word}" for word in ("now", "soon", "later", "once", "twice")]


class Drawn(nn.Module):
    """Stands in for a system: a video is its seed's noise, coloured by the length of its prompt."""

    fps = 8.0
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Dropout()
        self.logged: dict[str, float] = {}

    def generate(self, prompts: list[str], size: Any, seeds: list[int], **settings: Any) -> Tensor:
        torch.rand(1)  # a sampler that draws from the global state must not disturb the training
        noise = seeded_noise(seeds, 3, TokenGrid(size.num_frames, size.height, size.width))
        shift = torch.tensor([len(prompt) / 50 for prompt in prompts])
        return (0.5 * noise + shift[:, None, None, None, None]).clamp(-1, 1)

    def log(self, name: str, value: Tensor, **settings: Any) -> None:
        self.logged[name] = float(value)


def trainer(rank: int = 0, world_size: int = 1) -> Any:
    return SimpleNamespace(
        sanity_checking=False,
        world_size=world_size,
        global_rank=rank,
        is_global_zero=rank == 0,
        loggers=[],
        global_step=1,
    )


def score(callback: ScoreVideos, rank: int, world_size: int, real: Tensor) -> dict[str, float]:
    system = Drawn()
    ranks = trainer(rank, world_size)
    callback.on_validation_epoch_start(ranks, system)  # type: ignore[arg-type]
    batch = VideoBatch(
        video=real, captions=[""] * len(real), fps=torch.ones(len(real)), clip_ids=["x"] * len(real)
    )
    callback.on_validation_batch_end(ranks, system, None, batch, 0)  # type: ignore[arg-type]
    callback.on_validation_epoch_end(ranks, system)  # type: ignore[arg-type]
    return system.logged


def videos() -> ScoreVideos:
    tiny = TinyFile("random")
    metric = FrechetVideoDistance(tiny, tiny.feature_dim)
    return ScoreVideos("fvd", metric, PROMPTS, "5x16x16", against="real", batch_size=2)


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
def test_random_state_and_modes_are_as_before() -> None:
    callback, system = videos(), Drawn()
    system.train()
    system.part.eval()
    before = torch.random.get_rng_state()
    callback.on_validation_epoch_start(trainer(), system)  # type: ignore[arg-type]
    real = VideoBatch(
        video=torch.rand(5, 3, 5, 16, 16), captions=[""] * 5, fps=torch.ones(5), clip_ids=["x"] * 5
    )
    state = torch.random.get_rng_state()
    callback.on_validation_batch_end(trainer(), system, None, real, 0)  # type: ignore[arg-type]
    callback.on_validation_epoch_end(trainer(), system)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(before, state)  # the test's own draw: the comparison can fail
    assert system.training
    assert not system.part.training
    assert callback.state_dict() == {"num_validations": 1}
    assert list(system.logged) == ["scores/fvd"]


@pytest.mark.filterwarnings("ignore:Fréchet distance of", "ignore:The ``compute`` method")
def test_the_batch_size_makes_no_difference() -> None:
    real = torch.rand(5, 3, 5, 16, 16)
    values = []
    for batch_size in (1, 2, 5):
        callback = videos()
        callback.batch_size = batch_size
        values.append(score(callback, 0, 1, real)["scores/fvd"])
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_prompts_and_give_one_score(world_size: int) -> None:
    """What each rank noted, put together as the gathering does, is what one rank alone notes."""
    real = torch.rand(7, 3, 5, 16, 16)

    def noted(rank: int, ranks: int) -> dict[str, Tensor]:
        callback = videos()
        kept: dict[str, Tensor] = {}

        def keep() -> Tensor:
            for bank in ("real", "generated"):
                kept[bank] = torch.cat(getattr(callback.metric, bank))
            return torch.zeros(())

        callback.metric.compute = keep  # type: ignore[method-assign]
        share = real[: len(PROMPTS)][rank::ranks]
        score(callback, rank, ranks, share if len(share) else real[:1])
        return kept

    alone = noted(0, 1)
    shares = [noted(rank, world_size) for rank in range(world_size)]
    whole = videos().metric
    gathered = {bank: torch.cat([share[bank] for share in shares]) for bank in alone}
    whole.generated = [gathered["generated"]]
    rows = whole.rows("generated")
    assert torch.allclose(rows, alone["generated"][:, 1:], atol=1e-4)
    assert len(rows) == len(PROMPTS)
    if world_size <= len(PROMPTS):
        whole.real = [gathered["real"]]
        assert torch.allclose(whole.rows("real"), alone["real"][:, 1:], atol=1e-4)


def test_texts_and_several_scores() -> None:
    tiny = TinyFile("random")
    callback = ScoreVideos("clip", ClipScore(tiny), PROMPTS, "5x16x16", against="prompts")
    logged = score(callback, 0, 1, torch.rand(2, 3, 5, 16, 16))
    made = as_levels(Drawn().generate(PROMPTS, callback.size, list(range(5))))
    cosines = (tiny.embed_videos(made) * tiny.embed_texts(PROMPTS)).sum(dim=1)
    assert logged["scores/clip"] == pytest.approx(100 * float(cosines.mean()), abs=1e-3)
    motion = ScoreVideos("motion", Motion(), PROMPTS, "5x16x16", against="nothing")
    logged = score(motion, 0, 1, torch.rand(2, 3, 5, 16, 16))
    assert set(logged) == {
        "scores/flicker",
        "scores/proxy/dynamic_degree",
        "scores/proxy/motion_smoothness",
    }


def test_it_scores_every_so_many_validations() -> None:
    callback = ScoreVideos(
        "motion", Motion(), PROMPTS[:1], "5x16x16", against="nothing", every_n_validations=3
    )
    real = torch.rand(1, 3, 5, 16, 16)
    assert [bool(score(callback, 0, 1, real)) for _ in range(6)] == 2 * [False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts = 0: must be at least 1"),
        ({"prompts": ["a", " "]}, r"prompts\[1\] = ' ': is empty"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"size": "16x16"}, "not a video size"),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"prompts": ["a"], "size": "5x16x16", "against": "nothing"}
    with pytest.raises(ValueError, match=message):
        ScoreVideos("x", Motion(), **(settings | change))


def test_in_a_training_scores_and_samples_are_logged_and_the_weights_are_untouched(
    tmp_path: Path,
) -> None:
    """Two trainings, with and without scores, end with the same weights and the same keys."""
    clips = str(write_dataset(tmp_path / "clips", 4, 2, 0, num_workers=1)["train"])

    def part(class_path: str, **init_args: Any) -> dict[str, Any]:
        return {"class_path": class_path, "init_args": init_args}

    def fit(name: str, callbacks: list[dict[str, Any]]) -> dict[str, Any]:
        optimizer = part("torch.optim.AdamW", lr=1e-3)
        tokenizer = part(
            "sora_lightning.tokenizers.ConvTokenizer",
            latent_channels=4,
            widths=[8, 16],
            down_time=[True],
            down_space=[True],
            patch=4,
            blocks_per_level=1,
        )
        config = {
            "run_dir": str(tmp_path / name),
            "data": {
                "manifest": clips,
                "val_manifest": clips,
                "sizes": ["5x16x16"],
                "fps": 8,
                "pixels_per_batch": 2 * 5 * 16 * 16,
            },
            "trainer": {
                "max_steps": 2,
                "limit_val_batches": 2,
                "val_check_interval": 1,
                "num_sanity_val_steps": 0,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [part("sora_lightning.callbacks.EMA", decay=0.9), *callbacks],
            },
            "model": part(
                "sora_lightning.systems.DiffusionSystem",
                tokenizer=tokenizer,
                conditioner=part(
                    "sora_lightning.conditioning.TextConditioner", width=16, depth=1, num_heads=2
                ),
                denoiser=part(
                    "sora_lightning.denoisers.DiT", width=16, depth=1, num_heads=2, patch=[1, 1, 1]
                ),
                optimizer=optimizer,
            ),
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        run_training(["fit", "--config", str(tmp_path / f"{name}.yaml")])
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)

    judge = part("evaluation.features.TinyFile", weights="random")
    scored = part(
        "sora_lightning.callbacks.metrics.ScoreVideos",
        name="fvd-tiny-random",
        metric=part("evaluation.metrics.FrechetVideoDistance", extractor=judge, feature_dim=48),
        prompts=PROMPTS[:3],
        size="5x16x16",
        against="real",
        num_steps=1,
    )
    plain, with_scores = fit("plain", []), fit("scored", [scored])
    assert plain["state_dict"].keys() == with_scores["state_dict"].keys()
    for name, value in plain["state_dict"].items():
        assert torch.equal(value, with_scores["state_dict"][name]), name
    averaged = [content["callbacks"]["ema"]["weights"] for content in (plain, with_scores)]
    assert averaged[0].keys() == averaged[1].keys()
    assert all(torch.equal(averaged[0][name], averaged[1][name]) for name in averaged[0])
    assert plain.keys() == with_scores.keys()
    events = EventAccumulator(str(tmp_path / "scored"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert "scores/fvd-tiny-random" in events.Tags()["scalars"]
    assert any(tag.startswith("scores/fvd-tiny-random/") for tag in events.Tags()["images"])
