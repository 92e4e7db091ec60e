"""Tables of class vectors, which public networks hold themselves and a conditioner holds here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sora_lightning.conditioning import LabelConditioner
from sora_lightning.interop.pretrained import describe
from sora_lightning.interop.renaming import Rule, same

_IMAGENET_CLASSES = 1000


def label_table(table: Tensor) -> dict[str, Any]:
    """Describe the conditioner of a table.

    Its last row is the class of no label, unless the table has exactly ImageNet's 1000 rows.
    """
    rows, width = table.shape
    null_class = rows != _IMAGENET_CLASSES
    names = [str(number) for number in range(rows - null_class)]
    return describe(LabelConditioner, classes=names, width=width, null_class=null_class)


def label_rules(theirs: str) -> list[Rule]:
    return [same(theirs, "conditioner.embedding.weight")]
