"""A captioner's text tower as a text encoder gives what the captioner itself computes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sora_lightning.captioner.bpe import BOS, EOS
from sora_lightning.conditioning import CachedText
from sora_lightning.systems import CaptionerSystem, CaptionerText
from sora_lightning.types import Condition
from tests.systems.test_captioner import captioner_checkpoint  # noqa: F401 (a fixture)

CAPTIONS = ["a red circle moves left", "", "up"]


@pytest.fixture
def encoder(captioner_checkpoint: Path) -> CaptionerText:  # noqa: F811
    return CaptionerText(captioner_checkpoint)


def real(condition: Condition, clip: int) -> Tensor:
    return condition.tokens[clip, condition.mask[clip]]


def test_the_condition_is_what_the_tower_gives_each_caption_alone(encoder: CaptionerText) -> None:
    captioner = CaptionerSystem.from_checkpoint(encoder.checkpoint).captioner
    condition = encoder(CAPTIONS)
    for clip, caption in enumerate(CAPTIONS):
        tokens, cls = captioner.tower(captioner.bpe.encode([caption]))
        torch.testing.assert_close(real(condition, clip), captioner.tower.norm(tokens)[0])
        torch.testing.assert_close(condition.pooled[clip], cls[0])
    embedded = captioner.embed_captions(CAPTIONS)
    projected = torch.nn.functional.normalize(captioner.text_out(condition.pooled), dim=-1)
    torch.testing.assert_close(projected, embedded)


def test_the_captioner_neither_trains_nor_travels(encoder: CaptionerText, tmp_path: Path) -> None:
    assert list(encoder.state_dict()) == ["digest"]
    assert not list(encoder.parameters())
    encoder.load_state_dict(encoder.state_dict())
    other = {"digest": encoder.digest + 1}
    with pytest.raises(ValueError, match=r"CaptionerText\(checkpoint='.*'\) is "):
        encoder.load_state_dict(other)
    cached = CachedText(encoder, tmp_path).train()
    torch.testing.assert_close(cached(CAPTIONS).pooled, encoder(CAPTIONS).pooled)


def test_a_caption_beyond_the_context_is_cut_before_its_end_and_counted_once(
    encoder: CaptionerText,
) -> None:
    words = "left " * 200
    with pytest.warns(UserWarning, match=r"1 of 2 captions .*50%.* more than the 126 tokens that"):
        cut = encoder([words, "up"])
    assert int(cut.mask[0].sum()) == 128
    (bpe,) = encoder._bpe
    ids = torch.tensor([[BOS, *bpe.pieces([words])[0][:126], EOS]])
    torch.testing.assert_close(cut.pooled[:1], encoder.network(ids)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = encoder([words])
    torch.testing.assert_close(real(again, 0), real(cut, 0))


def test_a_file_that_holds_no_captioner_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint .*absent.ckpt does not exist"):
        CaptionerText(tmp_path / "absent.ckpt")
