import pytest
import torch

from sora_lightning.conditioning import LabelConditioner


def test_numbers_and_names_of_classes_are_the_same_and_classes_differ():
    labels = LabelConditioner(8, num_classes=3, names=["cat", "dog", "owl"])
    by_name, by_number = labels(["owl", "cat"]), labels(["2", " 0 "])
    assert torch.equal(by_name.pooled, by_number.pooled)
    assert torch.equal(by_name.tokens[:, 0], by_name.pooled)
    assert not torch.allclose(by_name.pooled[0], by_name.pooled[1])


def test_dropped_and_empty_captions_are_the_class_of_no_label():
    labels = LabelConditioner(8, num_classes=3)
    dropped = labels(["0", "1"], torch.tensor([True, False]))
    assert torch.equal(dropped.pooled[:1], labels.null(1).pooled)
    assert torch.equal(dropped.pooled[1:], labels(["1"]).pooled)
    assert torch.equal(labels.null(1).pooled[0], labels.embedding.weight[3])


def test_what_is_no_class_is_refused():
    with pytest.raises(ValueError, match="'3' is no class: give a number from 0 to 2"):
        LabelConditioner(8, num_classes=3)(["3"])
    with pytest.raises(ValueError, match="null_class is off"):
        LabelConditioner(8, num_classes=3, null_class=False).null(1)
    with pytest.raises(ValueError, match="2 different names for num_classes = 3"):
        LabelConditioner(8, num_classes=3, names=["a", "b", "b"])
