"""A system that is built from objects in Python is loaded from its checkpoint alone; what a file
cannot describe is refused before the first step.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

from sora_lightning.captioner import CoCa, VideoEncoder
from sora_lightning.captioner.decoding import Greedy
from sora_lightning.cli.functions import run_function
from sora_lightning.cli.sample import sample
from sora_lightning.conditioning import TextConditioner
from sora_lightning.configuration import KeepsArguments, configuration
from sora_lightning.data import Batching, VideoDataModule
from sora_lightning.denoisers import DiT
from sora_lightning.diffusion import LogitNormal, SquaredError
from sora_lightning.layers.partitions import FactorisedSelfAttention
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import CaptionerSystem, DiffusionSystem, TokenizerSystem
from sora_lightning.tokenizers import Adversarial, ConvTokenizer
from sora_lightning.tokenizers.discriminator import PatchDiscriminator3d

SIZE = TransformerSize(2, 24, 2)


def build_tokenizer() -> ConvTokenizer:
    return ConvTokenizer(4, widths=[8, 16], down_time=[True], down_space=[True], patch=4)


@pytest.fixture(scope="module")
def data(clips: dict[str, Path]) -> VideoDataModule:
    batching = Batching(sizes=["5x16x16"], pixels_per_batch=4 * 5 * 16 * 16)
    return VideoDataModule(clips["train"], clips["val"], batching=batching)


def build_trainer(folder: Path) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=2,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


@pytest.fixture(scope="module")
def trained(
    data: VideoDataModule, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiffusionSystem, Path]:
    folder = tmp_path_factory.mktemp("python")
    tokenizer, conditioner = build_tokenizer(), TextConditioner(width=16, depth=1, num_heads=2)
    system = DiffusionSystem(
        tokenizer,
        conditioner,
        DiT(4, 16, size=SIZE, patch=(1, 1, 1), layout=FactorisedSelfAttention()),
        time=LogitNormal(shift=2.0),
        objective=SquaredError(),
        optimizer=partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.99)),
    )
    trainer = build_trainer(folder)
    trainer.fit(system, data)
    trainer.save_checkpoint(folder / "system.ckpt")
    return system, folder / "system.ckpt"


def test_a_system_built_by_hand_is_loaded_from_its_checkpoint(
    trained: tuple[DiffusionSystem, Path],
) -> None:
    system, path = trained
    for loaded in (
        DiffusionSystem.from_checkpoint(path),
        DiffusionSystem.load_from_checkpoint(path, map_location="cpu"),
    ):
        assert loaded.time == LogitNormal(shift=2.0)
        assert isinstance(loaded.denoiser, DiT)
        for name, weight in system.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        videos = [one.eval().generate(["red"], "5x16x16", [0]) for one in (system, loaded)]
        assert torch.equal(*videos)


def test_sample_takes_the_checkpoint(trained: tuple[DiffusionSystem, Path], tmp_path: Path) -> None:
    output = tmp_path / "video.mp4"
    arguments = ["--checkpoint", str(trained[1]), "--prompt", "red", "--output", str(output)]
    run_function("sample", sample, [*arguments, "--num-steps", "2"])
    assert output.stat().st_size > 0


def test_a_loaded_system_trains_on_and_is_saved_again(
    trained: tuple[DiffusionSystem, Path], data: VideoDataModule, tmp_path: Path
) -> None:
    system = DiffusionSystem.load_from_checkpoint(trained[1], map_location="cpu")
    trainer = build_trainer(tmp_path)
    trainer.fit(system, data)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    loaded = DiffusionSystem.from_checkpoint(tmp_path / "again.ckpt")
    assert loaded.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 2e-3


def _saved(system: L.LightningModule, data: VideoDataModule, folder: Path) -> Path:
    trainer = build_trainer(folder)
    trainer.fit(system, data)
    trainer.save_checkpoint(folder / "system.ckpt")
    return folder / "system.ckpt"


@pytest.mark.parametrize(
    "adversarial", [None, Adversarial(PatchDiscriminator3d([4, 8]), weight=0.1, adaptive=False)]
)
def test_a_tokenizer_built_by_hand_is_loaded_too(
    adversarial: Adversarial | None, data: VideoDataModule, tmp_path: Path
) -> None:
    system = TokenizerSystem(build_tokenizer(), adversarial=adversarial)
    loaded = TokenizerSystem.from_checkpoint(_saved(system, data, tmp_path))
    assert loaded.tokenizer.fingerprint() == system.tokenizer.fingerprint()
    if adversarial is not None:
        assert loaded.adversarial is not None
        assert loaded.adversarial.weight == 0.1
        weights = loaded.adversarial.state_dict()
        assert all(torch.equal(weights[k], v) for k, v in adversarial.state_dict().items())


def test_a_captioner_built_by_hand_is_loaded_too(data: VideoDataModule, tmp_path: Path) -> None:
    encoder = VideoEncoder(SIZE, tubelet=(4, 8, 8))
    captioner = CoCa(encoder, SIZE, num_queries=2, vocab_size=300, context=128)
    system = CaptionerSystem(captioner, named_words={"colour": ["red", "green"]})
    loaded = CaptionerSystem.from_checkpoint(_saved(system, data, tmp_path))
    assert loaded.captioner.fingerprint() == system.captioner.fingerprint()
    videos, decoding = torch.zeros(1, 3, 5, 16, 16), Greedy()
    captions = [s.captioner.captions(videos, decoding, []) for s in (system.eval(), loaded)]
    assert captions[0] == captions[1]


def test_what_a_file_cannot_describe_is_refused_before_the_first_step(
    data: VideoDataModule, tmp_path: Path
) -> None:
    class Local(LogitNormal):
        pass

    def system(**parts: object) -> DiffusionSystem:
        denoiser = partial(DiT, size=SIZE, patch=(1, 1, 1))
        return DiffusionSystem(build_tokenizer(), TextConditioner(16, 1, 2), denoiser, **parts)

    for parts, message in (
        ({"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1)}, "optimizer: .*<lambda>"),
        ({"time": Local()}, "time: .*Local of .* cannot be imported"),
        ({"objective": torch.nn.MSELoss()}, "MSELoss cannot be kept in a checkpoint"),
    ):
        if "objective" in parts:
            parts["objective"].self_conditioning = 0.0
        with pytest.raises(ValueError, match=message):
            build_trainer(tmp_path).fit(system(**parts), data)


def test_a_denoiser_built_for_other_widths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"denoiser.latent_channels = 8: the tokenizer has 4"):
        DiffusionSystem(build_tokenizer(), TextConditioner(16, 1, 2), DiT(8, 16, size=SIZE))


def test_configurations_hold_plain_values_alone() -> None:
    class Part(KeepsArguments):
        def __init__(self, a: int, b: Path | None = None, *, c: tuple[float, ...] = ()) -> None:
            pass

    part = Part(1, b=Path("x"), c=(0.5,))
    assert part.arguments == {"a": 1, "b": Path("x"), "c": (0.5,)}
    described = configuration(LogitNormal(shift=2.0), "time")
    assert described["class_path"] == "sora_lightning.diffusion.times.LogitNormal"
    assert described["init_args"]["shift"] == 2.0
    described = configuration({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "parts")
    assert described["optimizer"]["init_args"] == {"lr": 0.1}
