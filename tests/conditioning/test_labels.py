import pytest
import torch

from sora_lightning.conditioning import LabelConditioner


def test_a_class_has_a_vector_of_its_own_and_none_is_another():
    conditioner = LabelConditioner(["cat", "dog"], width=8)
    condition = conditioner(["dog", "cat", "", "dog"], torch.tensor([False, False, False, True]))
    dog, cat, none = (conditioner.embedding.weight[i] for i in (1, 0, 2))
    assert torch.equal(condition.pooled, torch.stack([dog, cat, none, none]))
    assert torch.equal(condition.tokens[:, 0], condition.pooled)
    assert torch.equal(conditioner.null(1).pooled[0], none)


def test_what_names_no_class_is_refused():
    with pytest.raises(ValueError, match="'cow' is none of the 2 classes: cat, dog"):
        LabelConditioner(["cat", "dog"], width=8)(["cow"])
    with pytest.raises(ValueError, match="'' is none of the 2 classes"):
        LabelConditioner(["cat", "dog"], width=8, null_class=False).null(1)
    with pytest.raises(ValueError, match="a name of its own"):
        LabelConditioner(["cat", "cat"])
