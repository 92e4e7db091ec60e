"""A frozen encoder runs once for each caption, and several encoders make one condition."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sora_lightning.conditioning import CachedText, FrozenTextEncoder, JoinedText, TextConditioner
from sora_lightning.conditioning.joined import TextPart
from sora_lightning.types import Condition


class Counted(FrozenTextEncoder):
    """A token for each letter, of which the pooled vector is the sum; counts what it encodes."""

    def __init__(self, seed: int = 0, width: int = 4):
        table = nn.Embedding(256, width, _weight=torch.randn(256, width, generator=rng(seed)))
        super().__init__(lambda: table, width, hashlib.sha256(str(seed).encode()).hexdigest())
        self.encoded: list[str] = []

    def encode(self, captions: list[str]) -> Condition:
        self.encoded += captions
        lengths = torch.tensor([len(caption) + 1 for caption in captions])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = [(caption + "\n").ljust(mask.shape[1], "#") for caption in captions]
        tokens = self.network(torch.tensor([[ord(letter) for letter in text] for text in padded]))
        return Condition(tokens, mask, (tokens * mask[..., None]).sum(1))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real(condition: Condition, clip: int) -> Tensor:
    return condition.tokens[clip, condition.mask[clip]]


def test_a_cached_encoder_runs_once_for_each_caption_in_any_process(tmp_path: Path) -> None:
    encoder = Counted()
    cached = CachedText(encoder, tmp_path).train()
    plain = Counted()(["ab", "c", "ab", ""])
    for _ in range(2):
        condition = cached(["ab", "c", "ab", "x"], torch.tensor([False, False, False, True]))
        assert encoder.encoded == ["ab", "c", ""]
        assert torch.equal(condition.mask, plain.mask)
        assert torch.equal(condition.pooled, plain.pooled)
        assert all(torch.equal(real(condition, i), real(plain, i)) for i in range(4))
    again = Counted()
    CachedText(again, tmp_path).eval()(["c", "new", "ab"])
    assert again.encoded == ["new"]
    assert CachedText(Counted(), tmp_path).null(2).pooled.shape == (2, 4)


def test_another_encoder_has_a_cache_of_its_own(tmp_path: Path) -> None:
    CachedText(Counted(0), tmp_path).train()(["ab"])
    other = Counted(1)
    condition = CachedText(other, tmp_path).train()(["ab"])
    assert other.encoded == ["ab"]
    assert torch.equal(condition.pooled, Counted(1)(["ab"]).pooled)


def test_a_damaged_file_is_encoded_again_and_no_part_of_one_stays(tmp_path: Path) -> None:
    CachedText(Counted(), tmp_path).train()(["ab"])
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    encoder = Counted()
    cached = CachedText(encoder, tmp_path).train()
    assert torch.equal(cached(["ab"]).pooled, Counted()(["ab"]).pooled)
    cached(["ab"])
    assert encoder.encoded == ["ab"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_sampling_elsewhere_writes_nothing(tmp_path: Path) -> None:
    encoder = Counted()
    cached = CachedText(encoder, tmp_path / "absent").eval()
    assert torch.equal(cached(["ab"]).pooled, Counted()(["ab"]).pooled)
    assert not (tmp_path / "absent").exists()


def test_a_cache_asks_for_the_encoder_of_its_training(tmp_path: Path) -> None:
    state = CachedText(Counted(0), tmp_path).state_dict()
    CachedText(Counted(0), tmp_path).load_state_dict(state)
    with pytest.raises(ValueError, match="give the folder of that encoder"):
        CachedText(Counted(1), tmp_path).load_state_dict(state)


def test_tokens_of_several_encoders_follow_one_another_and_pooled_vectors_add_up() -> None:
    first, second = Counted(0), TextConditioner(6, 0)
    joined = JoinedText([TextPart(first), TextPart(second)], width=8)
    condition = joined(["ab", "c"])
    a, b = first(["ab", "c"]), second(["ab", "c"])
    into_a, into_b = joined.tokens_in
    torch.testing.assert_close(condition.tokens, torch.cat([into_a(a.tokens), into_b(b.tokens)], 1))
    assert torch.equal(condition.mask, torch.cat([a.mask, b.mask], 1))
    weight = torch.cat([into.weight for into in joined.pooled_in], 1)  # of the vectors side by side
    bias = sum(into.bias for into in joined.pooled_in)
    expected = torch.cat([a.pooled, b.pooled], 1) @ weight.T + bias
    torch.testing.assert_close(condition.pooled, expected)


def test_one_encoder_may_give_tokens_and_another_the_pooled_vector() -> None:
    words, letters = TextConditioner(8, 0), Counted()
    joined = JoinedText([TextPart(letters, pooled=False), TextPart(words, tokens=False)], width=8)
    condition = joined(["ab", "c"], torch.tensor([False, True]))
    assert torch.equal(condition.mask, letters(["ab", ""]).mask)
    torch.testing.assert_close(condition.pooled, joined.pooled_in[0](words(["ab", ""]).pooled))
    assert len(joined.tokens_in) == len(joined.pooled_in) == 1
    condition.pooled.sum().backward()
    assert words.embedding.weight.grad is not None  # one that trains goes on training


def test_parts_that_give_no_condition_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens and pooled are both false"):
        TextPart(Counted(), tokens=False, pooled=False)
    with pytest.raises(ValueError, match="parts: pooled is false in all of them"):
        JoinedText([TextPart(Counted(), pooled=False)], width=8)
