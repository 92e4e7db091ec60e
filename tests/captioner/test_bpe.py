import pytest
import torch

from sora_lightning.captioner.bpe import BOS, EOS, PAD, BytePairEncoding
from tests.captioner.networks import CAPTIONS


@pytest.fixture
def bpe():
    bpe = BytePairEncoding(300)
    bpe.train_on(CAPTIONS)
    return bpe


@pytest.mark.parametrize(
    "text", [*CAPTIONS, "日本語 <pad> </s>", "Never seen: ½ Ω!", "two  spaces"]
)
def test_any_text_comes_back(bpe, text):
    assert bpe.decode(bpe.encode([text])) == [text]


def test_a_zero_which_no_manifest_may_hold_is_replaced(bpe):
    assert bpe.decode(bpe.encode(["red\0circle"])) == ["red\ufffdcircle"]


def test_equal_texts_have_equal_ids(bpe):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert bpe.pieces([composed]) == bpe.pieces([decomposed])


def test_ids_are_framed_and_padded(bpe):
    ids = bpe.encode(["a blue square", "up"])
    assert (ids[:, 0] == BOS).all()
    for row in ids:
        end = (row == EOS).nonzero().item()
        assert (row[end + 1 :] == PAD).all()
        assert (row[1:end] > EOS).all()
    assert ids[0, -1] == EOS


def test_pairs_that_occur_often_are_one_token():
    bpe = BytePairEncoding(262)  # room for two pairs
    bpe.train_on(["abab"] * 9)
    (ids,) = bpe.pieces(["abab"])
    assert len(ids) < len(" abab")
    assert max(ids) < 262


def test_the_vocabulary_travels_in_the_state_dict(bpe, tmp_path):
    torch.save({"weights": bpe.state_dict()}, tmp_path / "state.pt")
    other = BytePairEncoding(300)
    with pytest.raises(ValueError, match="no vocabulary yet"):
        other.encode(CAPTIONS)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)["weights"])
    assert other.pieces(CAPTIONS) == bpe.pieces(CAPTIONS)


def test_a_vocabulary_of_another_size_is_refused(bpe):
    with pytest.raises(ValueError, match="does not fit vocab_size = 270"):
        BytePairEncoding(270).set_extra_state(bpe.get_extra_state())
    with pytest.raises(ValueError, match="vocab_size = 100: must be at least 260"):
        BytePairEncoding(100)
