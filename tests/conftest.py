"""Fixtures of every test: one seed, and shapes checked where tensors cross a function."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import install_import_hook

# Modules of pure tensor code; the hook rewrites them as they are first imported, so it stands
# before the tests' imports. Classes that a YAML configures stand in some of them: their signatures
# stay readable, because the hook wraps in place.
_CHECKED = [
    "sora_lightning.layers",
    "sora_lightning.tokenizers",
    "sora_lightning.denoisers",
    "sora_lightning.diffusion",
]
install_import_hook(_CHECKED, "beartype.beartype")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
