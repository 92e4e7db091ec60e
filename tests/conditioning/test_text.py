"""Text conditioning: words, truncation, and words that training has never seen."""

from __future__ import annotations

import unicodedata
import warnings

import pytest
import torch

from sora_lightning.conditioning import LabelConditioner, TextConditioner
from sora_lightning.conditioning.text import split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red circle, moves_left 3 times!", ["a", "red", "circle", "moves_left", "3", "times"]),
        ("don't stop", ["don", "t", "stop"]),
        ("一个红色圆圈", list("一个红色圆圈")),
        ("赤い円", list("赤い円")),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("สีแดง", ["สี", "แ", "ด", "ง"]),
        ("a 🔴 moves", ["a", "🔴", "moves"]),
        ("❤️", ["❤️"]),
        ("", []),
        ("?! ́", []),
    ],
)
def test_words_of_many_scripts(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_ascii_is_split_as_any_text() -> None:
    """A letter that is not ASCII, as a word of its own, turns the shorter way off."""
    codes = torch.randint(128, (500, 20), generator=torch.Generator().manual_seed(0))
    for text in ("".join(map(chr, row)) for row in codes.tolist()):
        assert [*split_words(text), "é"] == split_words(f"{text} é")


def test_composed_and_decomposed_letters_are_one_word() -> None:
    composed, decomposed = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert split_words(composed) == split_words(decomposed) == ["café"]
    conditioner = TextConditioner(8, 0)
    assert conditioner.rows(composed) == conditioner.rows(decomposed)


def test_captions_that_are_cut_are_counted_once() -> None:
    conditioner = TextConditioner(8, 0, max_words=3)
    with pytest.warns(UserWarning, match=r"1 of 4 captions .*25%.* max_words = 3 words, up to 5"):
        conditioner(["one two three", "one two three four five", "", "one"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditioner(["one two three four five"])


def test_words_that_training_never_saw_are_named_and_the_record_is_saved() -> None:
    conditioner = TextConditioner(8, 0).train()
    assert conditioner.unseen_words(["a red circle"]) == ["a", "red", "circle"]
    conditioner(["a red circle", "a blue square"], torch.tensor([False, True]))
    conditioner.eval()
    conditioner(["a green triangle"])  # validation is no training
    restored = TextConditioner(8, 0)
    restored.load_state_dict(conditioner.state_dict())
    prompts = ["A red circle", "a green circle, green and blue"]
    assert restored.unseen_words(prompts) == ["green", "and", "blue"]
    assert LabelConditioner(["cat"], 8).unseen_words(["dog"]) == []
