"""Barcode videos by name, and one small synthetic dataset for all tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sora_lightning.data import write_dataset
from tests.data.barcodes import write_barcodes


@pytest.fixture
def barcodes(tmp_path: Path) -> Callable[..., Path]:
    """Writes a barcode video of a name under the test's own folder."""

    def write(name: str, times_ms: Sequence[int], **settings: object) -> Path:
        return write_barcodes(tmp_path / name, times_ms, **settings)  # type: ignore[arg-type]

    return write


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The manifests of a small synthetic dataset, by split."""
    return write_dataset(tmp_path_factory.mktemp("shapes"), num_train=30, num_val=6, num_test=10)
