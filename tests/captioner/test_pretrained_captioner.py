"""A vision-language model of transformers captions clips from its folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sora_lightning.captioner import PretrainedCaptioner
from sora_lightning.captioner.decoding import Beam, Decoding, Greedy, Nucleus
from sora_lightning.systems import RecaptioningSystem
from sora_lightning.systems.draws import make_rng
from tests.captioner.networks import llava_folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava"))


def clips() -> torch.Tensor:
    return torch.rand(3, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def rngs(*names: str) -> list[torch.Generator]:
    return [make_rng(torch.device("cpu"), 0, name) for name in names]


@pytest.mark.parametrize("decoding", [Greedy(6), Beam(6, num_beams=2), Nucleus(6)], ids=str)
def test_a_clips_caption_depends_on_its_frames_and_not_on_its_batch(
    llava: Path, decoding: Decoding
) -> None:
    captioner = PretrainedCaptioner(llava, prompt="a circle", num_frames=2)
    together = captioner.captions(clips(), decoding, rngs("a", "b", "c"))
    alone = [captioner.captions(clips()[i : i + 1], decoding, rngs("abc"[i]))[0] for i in range(3)]
    assert together == alone
    assert len({caption for (caption,) in together}) > 1
    assert all(caption for (caption,) in together)
    unseen = clips()
    unseen[:, :, 1:-1] = 0  # between the two frames that it sees
    assert captioner.captions(unseen, decoding, rngs("a", "b", "c")) == together


def test_fingerprint_names_weights_and_question(llava: Path) -> None:
    captioner = PretrainedCaptioner(llava)
    assert PretrainedCaptioner(llava).fingerprint() == captioner.fingerprint()
    assert PretrainedCaptioner(llava, prompt="a").fingerprint() != captioner.fingerprint()
    assert PretrainedCaptioner(llava, num_frames=3).fingerprint() != captioner.fingerprint()
    with torch.no_grad():
        next(captioner.model.parameters()).add_(1)
    assert PretrainedCaptioner(llava).fingerprint() != captioner.fingerprint()


def test_candidates_need_a_contrastive_captioner(llava: Path) -> None:
    with pytest.raises(ValueError, match="num_candidates = 4: a PretrainedCaptioner has no"):
        RecaptioningSystem(PretrainedCaptioner(llava), Nucleus(num_candidates=4))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "holds no config.json of a vision-language model"),
        ("model.safetensors", "holds no vision-language model to read"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(
    llava: Path, tmp_path: Path, lost: str, message: str
) -> None:
    for file in llava.iterdir():
        if file.name != lost:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{message}"):
        PretrainedCaptioner(tmp_path)
