import pytest

from sora_lightning.captioner.named_words import NamedWords

WORDS = {"colour": ["red", "blue"], "direction": ["left", "up"]}


def scores(*pairs):
    metric = NamedWords(WORDS)
    for generated, right in pairs:
        metric.update([generated], [right])
    return {name: float(share) for name, share in metric.compute().items()}


def test_words_count_in_every_form_and_together_as_things():
    two = "A red circle moves up, a blue square moves left"
    right = {"colour": 1, "direction": 1, "all": 1}
    assert scores((two, "RED goes upwards and blue leftward")) == right
    assert scores((two, "a blue one goes left, a red one up")) == right
    swapped = "A blue circle moves up, a red square moves left"
    assert scores((swapped, two)) == {"colour": 1, "direction": 1, "all": 0}
    wrong = {"colour": 1, "direction": 0, "all": 0}
    assert scores(("a red circle moves left then up", "a red circle moves left")) == wrong
    assert scores(("uplifted, red", "red up")) == wrong
    assert scores((two, "red and red go left and up"))["colour"] == 0


def test_what_the_right_caption_does_not_name_is_not_counted():
    assert scores(("a red one", "a dog"), ("red", "red"), ("blue", "red")) == {"colour": 0.5}
    assert scores(("red", "red"), ("red up", "red up"), ("blue", "red up"))["all"] == 0.5


def test_a_word_in_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"words.colour = 'red': must be a list of words"):
        NamedWords({"colour": "red"})
