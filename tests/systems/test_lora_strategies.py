"""Adapters of a public network train under DDP and FSDP2 on two processes as on one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from sora_lightning.checkpoints import read_checkpoint
from sora_lightning.conditioning import PretrainedText
from sora_lightning.data import write_dataset
from sora_lightning.systems import DiffusionSystem, Pipeline, PretrainedSystem
from tests.ranks import Pair
from tests.systems.test_strategies import ADAMW, CLOSE, DENSE, run

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")
from tests.denoisers.pipelines import pipeline_folder  # noqa: E402

pytestmark = pytest.mark.slow

DORA = {
    **{"r": 4, "target_modules": ["to_q", "to_v", "to_out.0"], "use_dora": True},
    **{"rank_pattern": {"attn2.to_q": 2}, "alpha_pattern": {"attn2.to_q": 4}},
}


def adapted_system(folder: Path, dtype: str = "float32") -> DiffusionSystem:
    torch.manual_seed(0)
    pipeline = Pipeline(folder, peft.LoraConfig(**DORA), dtype, activation_checkpointing=True)  # type: ignore[arg-type]
    system = PretrainedSystem(
        pipeline,
        conditioner=PretrainedText(folder, dtype="float32"),
        drop_condition=0.5,
        optimizer=ADAMW,
        warmup_steps=4,
    )
    for name, parameter in system.denoiser.named_parameters():
        if "lora_A" in name or "lora_B" in name:  # B = 0 would hide the gradients of A
            parameter.data.normal_(std=0.1)
    return system


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    ranks = Pair()
    yield ranks
    ranks.stop(patience_s=10)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return write_dataset(folder, num_train=24, num_val=8, num_test=0, num_workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    pipeline_folder("Wan", folder)
    return folder


def test_adapters_move_between_strategies_and_stay_the_same(
    pair: Pair, manifests: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """Losses, gradients, adapters, averages and validations equal those of one process that
    accumulates two batches; each checkpoint holds adapters alone, and the next strategy resumes it.
    """
    alone, moved, make = tmp_path / "alone", tmp_path / "moved", partial(adapted_system, folder)
    (one,) = run(None, alone, "auto", manifests, DENSE, 8, 2, make)
    ways = [("fsdp2", 1), ("ddp", 1), ("auto", 2), ("fsdp2", 1)]
    for number, (strategy, accumulate) in enumerate(ways):
        ranks = None if strategy == "auto" else pair
        two = run(ranks, moved, strategy, manifests, DENSE, 2 * number + 2, accumulate, make)
        expected = one["losses"][4 * number : 4 * number + 4]
        for rank, record in enumerate(two):
            wanted = expected[rank::2] if accumulate == 1 else expected
            torch.testing.assert_close(record["losses"], wanted, **CLOSE)
            assert record["gradients"].keys() == one["gradients"].keys()
            if number == 0:
                torch.testing.assert_close(record["gradients"], one["gradients"], **CLOSE)
        names = read_checkpoint(moved / "last.ckpt")["state_dict"].keys()
        assert all(".lora_" in name or name.endswith(".digest") for name in names)
    torch.testing.assert_close(two[0]["validation"], one["validation"], **CLOSE)
    first, second = (read_checkpoint(one / "last.ckpt") for one in (alone, moved))
    torch.testing.assert_close(second["state_dict"], first["state_dict"], **CLOSE)
    averages = [content["callbacks"]["ema"]["weights"] for content in (first, second)]
    assert {name.split(".")[-3] for name in averages[0]} == {
        *("lora_A", "lora_B", "lora_magnitude_vector"),
    }
    torch.testing.assert_close(averages[1], averages[0], **CLOSE)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_adapters_beside_bfloat16_have_the_gradients_of_one_process(
    strategy: str, pair: Pair, manifests: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """Frozen weights and adapters, of two types, are shared out together."""
    make = partial(adapted_system, folder, "bfloat16")
    (one,) = run(None, tmp_path / "one", "auto", manifests, DENSE, 1, 2, make)
    for rank, record in enumerate(
        run(pair, tmp_path / "two", strategy, manifests, DENSE, 1, 1, make)
    ):
        torch.testing.assert_close(record["losses"], one["losses"][rank::2], **CLOSE)
        torch.testing.assert_close(record["gradients"], one["gradients"], **CLOSE)
