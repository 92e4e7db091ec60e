"""Whatever a file holds, its reader returns what it means or refuses it with a ``ValueError``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_lightning.checkpoints import load_tokenizer, plain_hyperparameters, read_checkpoint
from sora_lightning.cli.inspecting import inspect
from sora_lightning.cli.sources import read_yaml
from sora_lightning.data import read_manifest
from sora_lightning.data.manifest.prompts import read_prompts
from sora_lightning.systems import TokenizerSystem
from sora_lightning.tokenizers import ConvTokenizer
from tests.test_checkpoint_shards import WEIGHT, write

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
_ROW = st.dictionaries(_KEYS, _PLAIN, max_size=5)
_FOUND = _ROW.map(lambda row: {**row, "path": "a.mp4", "caption": "a"})
_ROWS = st.lists(_FOUND | _ROW | _PLAIN, max_size=3)


def _read(reader: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """Return what a reader makes of a file; ``None`` where it refuses it by name."""
    path.write_bytes(content)
    return _outcome(reader, path)


def _outcome(reader: Callable[[Path], Any], path: Path) -> Any:
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
@example(rb'{"run_dir": "\0"}')
def test_a_yaml_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    values = _read(read_yaml, tmp_path / "experiment.yaml", content)
    assert values is None or (isinstance(values, dict) and r"\x00" not in repr(values))


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


@fuzz
@given(_PLACES)
def test_a_damaged_part_of_a_checkpoint_is_read_or_refused(
    tmp_path: Path, places: list[tuple[float, int]]
) -> None:
    """Where only a value is damaged, that value is another."""
    path = min(write(tmp_path).iterdir())
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    found = _outcome(read_checkpoint, tmp_path / "last.ckpt")
    assert found is None or torch.equal(found["state_dict"]["weight"][2:], WEIGHT[2:])


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """As a training writes it."""
    system = TokenizerSystem(ConvTokenizer(2, [4], [], [], patch=2, blocks_per_level=1))
    loader = {"plan": "0", "position": 1, "settings": {"data.fps": "8.0"}}
    return {
        "state_dict": system.state_dict(),
        "hyper_parameters": plain_hyperparameters(system),
        "callbacks": {"ema": {"num_updates": 1, "weights": system.state_dict()}},
        "loops": {"fit_loop": {"state_dict": {"combined_loader": [loader]}}},
        "provenance": {"configuration": {"seed_everything": 0}, "commit": "0", "versions": {}},
        "training_sizes": ["5x16x16"],
        "global_step": 1,
    }


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys of each value within; of a table of tensors, those of the first."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        children = list(value.items() if isinstance(value, dict) else enumerate(value))
    if children and isinstance(children[0][1], Tensor):
        children = children[:1]
    for key, child in children:
        yield (*at, key)
        yield from _places(child, (*at, key))


@fuzz
@given(st.floats(0, 1, exclude_max=True), _PLAIN | st.just(torch.ones(2)))
def test_a_checkpoint_of_other_values_is_read_or_refused(
    content: dict[str, Any], tmp_path: Path, place: float, value: Any
) -> None:
    content = deepcopy(content)
    places = list(_places(content))
    *parents, last = places[int(place * len(places))]
    parent: Any = content
    for key in parents:
        parent = parent[key]
    parent[last] = value
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    _outcome(inspect, path)
    _outcome(load_tokenizer, path)
