"""Lets `lightning` and `torchmetrics` import beside a torchvision whose compiled operators do not
load.

Both import torchvision as soon as it is installed, and torchvision registers shape functions for
two of its operators before it looks whether they exist: built for another torch (CUDA wheels beside
a CPU-only torch), its import ends in ``RuntimeError: operator torchvision::nms does not exist``.
Declaring the two schemas is enough for everything but the operators themselves, which still
raise torchvision's own explanation when called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def make_torchvision_importable() -> bool:
    """Import torchvision if it is installed, and declare its missing operators if that is what
    stops it.

    Does nothing where torchvision is absent, imported already or sound; any error but that of the
    missing operators is raised. Call it before the first import of lightning or torchmetrics.

    Returns:
        Whether the schemas had to be declared.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    else:
        return False
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_operators()
    importlib.import_module("torchvision")
    return True


# A Library withdraws its definitions when it is collected: the cache keeps it alive.
@cache
def _declare_operators() -> torch.library.Library:
    import torch  # only where it is needed: this module runs before every command, even `--help`

    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
