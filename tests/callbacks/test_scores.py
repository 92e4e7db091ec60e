"""Scores while a model trains do not disturb it, and do not depend on how many ranks there are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from evaluation.features import TinyFile
from evaluation.inputs import CutClips, as_batch, read_listing
from evaluation.metrics import frechet_distance
from evaluation.metrics.intervals import bootstrap_interval
from evaluation.metrics.motion import MOTION
from evaluation.protocol import ClipSpec
from evaluation.training_scores import FVD, CLIPScore, Motion
from sora_lightning.callbacks import ScoreVideos
from sora_lightning.cli.training import run_training
from sora_lightning.data.synthetic.render import write_dataset
from sora_lightning.generation import seeded_noise
from sora_lightning.types import TokenGrid, VideoSize, as_levels

PROMPTS = [f"a red circle moves left {word}" for word in "abcdefghi"]


class Drawn(nn.Module):
    """Stands in for a system: a video is its seed's noise, coloured by the length of its prompt."""

    fps = 8.0
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Dropout()
        self.logged: dict[str, float] = {}

    def generate(
        self, prompts: list[str], size: Any, seeds: list[int], sampling: Any = None
    ) -> Tensor:
        torch.rand(1)  # a sampler that draws from the global state must not disturb the training
        noise = seeded_noise(seeds, 3, TokenGrid(size.num_frames, size.height, size.width))
        shift = torch.tensor([len(prompt) / 50 for prompt in prompts])
        return (0.5 * noise + shift[:, None, None, None, None]).clamp(-1, 1)

    def log(self, name: str, value: Tensor, **settings: Any) -> None:
        self.logged[name] = float(value)


def trainer(rank: int = 0, world_size: int = 1) -> Any:
    return SimpleNamespace(
        sanity_checking=False,
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        is_global_zero=rank == 0,
        loggers=[],
        global_step=1,
    )


def score(callback: ScoreVideos, rank: int = 0, world_size: int = 1) -> dict[str, float]:
    system = Drawn()
    callback.on_validation_epoch_end(trainer(rank, world_size), system)  # type: ignore[arg-type]
    return system.logged


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    return write_dataset(folder, num_train=0, num_val=9, num_test=0, num_workers=1)["val"]


@pytest.fixture
def videos(reference: Path, tmp_path: Path) -> Callable[[], ScoreVideos]:
    def build() -> ScoreVideos:
        fvd = FVD(TinyFile("random"), reference, cache=tmp_path)
        fvd.prepare(PROMPTS, 5, 16, 16, 8.0)
        return ScoreVideos([fvd], PROMPTS, "5x16x16", batch_size=2)

    return build


FVD_NAMES = {f"scores/fvd-tiny-random{part}" for part in ("", "/low", "/high")}


def test_random_state_and_modes_are_as_before(videos: Callable[[], ScoreVideos]) -> None:
    callback, system = videos(), Drawn()
    system.train()
    system.part.eval()
    before = torch.random.get_rng_state()
    torch.rand(1)
    state = torch.random.get_rng_state()
    callback.on_validation_epoch_end(trainer(), system)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(before, state)  # the test's own draw: the comparison can fail
    assert system.training
    assert not system.part.training
    assert callback.state_dict() == {"num_validations": 1}
    assert set(system.logged) == FVD_NAMES


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_batch_size_makes_no_difference(videos: Callable[[], ScoreVideos]) -> None:
    values = []
    for batch_size in (1, 2, 9):
        callback = videos()
        callback.batch_size = batch_size
        values.append(score(callback)["scores/fvd-tiny-random"])
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_the_distance_is_that_of_the_features_to_the_reference(
    videos: Callable[[], ScoreVideos], reference: Path, tmp_path: Path
) -> None:
    """The callback's FVD is the function's, of clips cut out as the command cuts them."""
    made = as_levels(Drawn().generate(PROMPTS, VideoSize(5, 16, 16), list(range(len(PROMPTS)))))
    clips = ClipSpec(5, 8.0, ("16x16",))
    real = as_batch(list(CutClips(read_listing(reference), clips, "middle", 0)))  # type: ignore[arg-type]
    tiny = TinyFile("random")
    logged = score(videos())
    with pytest.warns(UserWarning, match="Fréchet distance of"):
        expected = float(frechet_distance(tiny.features(made), tiny.features(real)))
    assert logged["scores/fvd-tiny-random"] == pytest.approx(expected, rel=1e-3)
    low, high = (logged[f"scores/fvd-tiny-random/{side}"] for side in ("low", "high"))
    assert low < logged["scores/fvd-tiny-random"] < high


def test_features_of_the_reference_are_made_once_by_content(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(manifest: Path) -> Tensor:
        fvd = FVD(TinyFile("random"), manifest, cache=tmp_path / "cache")
        fvd.prepare(PROMPTS, 5, 16, 16, 8.0)
        return fvd.real

    first = prepared(reference)
    moved = tmp_path / "moved"
    shutil.copytree(reference.parent, moved)
    with monkeypatch.context() as patch:
        patch.setattr(TinyFile, "features", lambda *_: pytest.fail("features are made again"))
        assert torch.equal(prepared(moved / reference.name), first)
    rows = (moved / reference.name).read_text().splitlines(keepends=True)
    (moved / reference.name).write_text("".join(reversed(rows)))
    assert torch.allclose(prepared(moved / reference.name), first.flip(0))


@pytest.mark.parametrize("world_size", [2, 3, 7, 11])
def test_ranks_share_the_prompts_and_give_one_score(
    world_size: int, videos: Callable[[], ScoreVideos]
) -> None:
    """Rows of several ranks, gathered, are the rows that one rank alone collects."""

    def noted(rank: int, ranks: int) -> Tensor:
        callback = videos()
        (fvd,) = callback.scores
        kept: list[Tensor] = []

        def keep() -> dict[str, float]:
            kept.append(torch.cat(fvd.generated))  # type: ignore[attr-defined]
            return {}

        fvd.compute = keep  # type: ignore[method-assign]
        score(callback, rank, ranks)
        return kept[0]

    alone = noted(0, 1)
    (whole,) = videos().scores
    assert isinstance(whole, FVD)
    whole.generated = [torch.cat([noted(rank, world_size) for rank in range(world_size)])]
    rows = whole.rows("generated")
    assert torch.allclose(rows, alone[:, 1:], atol=1e-4)
    assert len(rows) == len(PROMPTS)


def test_texts_and_several_scores() -> None:
    tiny = TinyFile("random")
    clip = CLIPScore(tiny)
    clip.prepare(PROMPTS, 5, 16, 16, 8.0)
    callback = ScoreVideos([clip, Motion()], PROMPTS, "5x16x16")
    logged = score(callback)
    made = as_levels(Drawn().generate(PROMPTS, callback.size, list(range(len(PROMPTS)))))
    cosines = 100 * (tiny.embed_videos(made) * tiny.embed_texts(PROMPTS)).sum(dim=1)
    name = "scores/clip_score-tiny-random"
    assert logged[name] == pytest.approx(float(cosines.mean()), abs=1e-3)
    assert (logged[f"{name}/low"], logged[f"{name}/high"]) == pytest.approx(
        bootstrap_interval(cosines.double().numpy()), abs=1e-3
    )
    names = [name, *(f"scores/{motion}" for motion in MOTION)]
    assert set(logged) == {f"{name}{part}" for name in names for part in ("", "/low", "/high")}


def test_it_scores_every_so_many_validations() -> None:
    callback = ScoreVideos([Motion()], PROMPTS[:1], "5x16x16", every_n_validations=3)
    assert [bool(score(callback)) for _ in range(6)] == 2 * [False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts = 0: must be at least 1"),
        ({"prompts": ["a", " "]}, r"prompts\[1\] = ' ': is empty"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"scores": []}, "scores = 0"),
        ({"num_videos": 0}, "num_videos = 0"),
        ({"size": "16x16"}, "not a video size"),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"scores": [Motion()], "prompts": ["a"], "size": "5x16x16"}
    with pytest.raises(ValueError, match=message):
        ScoreVideos(**(settings | change))


def test_in_a_training_scores_and_samples_are_logged_and_the_weights_are_untouched(
    tmp_path: Path,
) -> None:
    """Two trainings, with and without scores, end with the same weights and the same keys."""
    clips = str(write_dataset(tmp_path / "clips", 8, 2, 0, num_workers=1)["train"])

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
                "fps": 8,
                "batching": {"sizes": ["5x16x16"], "pixels_per_batch": 2 * 5 * 16 * 16},
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
                    "sora_lightning.denoisers.DiT",
                    size={"depth": 1, "width": 16, "num_heads": 2},
                    patch=[1, 1, 1],
                ),
                optimizer=optimizer,
            ),
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        run_training(["fit", "--config", str(tmp_path / f"{name}.yaml")])
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)

    network = part("evaluation.features.TinyFile", weights="random")
    cache = str(tmp_path / "features")
    fvd = part("evaluation.training_scores.FVD", network=network, reference=clips, cache=cache)
    scored = part(
        "sora_lightning.callbacks.ScoreVideos",
        scores=[fvd, part("evaluation.training_scores.CLIPScore", network=network)],
        prompts=PROMPTS,
        size="5x16x16",
        sampling={"num_steps": 1},
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
    assert {*FVD_NAMES, "scores/clip_score-tiny-random"} <= set(events.Tags()["scalars"])
    assert any(tag.startswith("scores/a red circle") for tag in events.Tags()["images"])
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"scores/fvd-tiny-random/low" in layout
