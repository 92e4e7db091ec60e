"""Whatever a file holds, its reader returns what it means or refuses it with a ``ValueError``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sora_lightning.checkpoints import read_checkpoint
from sora_lightning.cli.sources import read_yaml
from sora_lightning.data import read_manifest
from sora_lightning.data.manifest.prompts import read_prompts

NUM_CASES = 60
fuzz = settings(
    max_examples=NUM_CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
_KEYS = st.sampled_from(
    ["path", "caption", "captions", "fps", "num_frames", "width", "height", "duration_s", "start"]
)
_ROWS = st.lists(st.dictionaries(_KEYS, _PLAIN, max_size=5) | _PLAIN, max_size=3)


def _read(reader: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """Return what a reader makes of a file; ``None`` where it refuses it by name."""
    path.write_bytes(content)
    refusal = ""
    try:
        return reader(path)
    except ValueError as error:
        refusal = str(error)
    assert path.name in refusal
    return None


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


@fuzz
@given(st.binary(max_size=200) | _ROWS.map(_lines), st.sampled_from([".jsonl", ".csv"]))
def test_a_manifest_is_read_or_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    records = _read(read_manifest, tmp_path / f"clips{suffix}", content)
    assert records is None or all(record.path for record in records)


@fuzz
@given(st.binary(max_size=200) | st.text(max_size=80).map(str.encode))
def test_prompts_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    rows = _read(read_prompts, tmp_path / "prompts.txt", content)
    assert rows is None or all(row.captions()[0][0].strip() for row in rows)


@fuzz
@given(st.binary(max_size=200) | _PLAIN.map(json.dumps).map(str.encode))
def test_a_yaml_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    values = _read(read_yaml, tmp_path / "experiment.yaml", content)
    assert values is None or isinstance(values, dict)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "small.ckpt"
    content = {"state_dict": {"weight": torch.ones(4)}, "hyper_parameters": {"width": 4}}
    torch.save(content, path)
    return path.read_bytes()


_PLACES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1)


@fuzz
@given(_PLACES)
def test_a_damaged_checkpoint_is_read_or_refused(
    checkpoint: bytes, tmp_path: Path, places: list[tuple[float, int]]
) -> None:
    content = bytearray(checkpoint)
    for place, value in places:
        content[int(place * len(content))] = value
    found = _read(read_checkpoint, tmp_path / "damaged.ckpt", bytes(content))
    assert found is None or {"state_dict", "hyper_parameters"} <= found.keys()
