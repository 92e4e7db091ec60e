"""Weights come from where they are said to be, and are what they are said to be, or not at all."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from evaluation.features.weights import (
    cache_folder,
    digest_of,
    load_exactly,
    locate_weights,
    read_weights,
    unwrapped,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_path_variable_and_url_lead_to_one_content(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_of(file)
    assert digest == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert locate_weights(str(file), digest) == file
    monkeypatch.setenv("SOME_WEIGHTS", str(file))
    assert locate_weights("env:SOME_WEIGHTS", digest) == file
    fetched = locate_weights(file.as_uri(), digest)
    assert fetched.parent == cache_folder()
    assert fetched.read_bytes() == file.read_bytes()
    file.unlink()
    assert locate_weights(fetched.as_uri().replace(fetched.name, "weights.pt"), digest) == fetched


def test_the_git_digest_is_what_git_says(file: Path) -> None:
    said = subprocess.run(["git", "hash-object", str(file)], capture_output=True, text=True)
    assert digest_of(file, "git") == f"git:{said.stdout.strip()}"


@pytest.mark.parametrize("kind", ["sha256", "git"])
@pytest.mark.parametrize("place", [0, 700, -1])
def test_one_flipped_byte_is_refused_with_both_hashes(file: Path, kind: str, place: int) -> None:
    expected = digest_of(file, kind)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"is {digest_of(file, kind)}, and {expected} is expected"):
        locate_weights(str(file), expected)
    with pytest.raises(ValueError, match=f"is {digest_of(file, kind)}, and {expected} is expected"):
        locate_weights(file.as_uri(), expected)
    assert not list(cache_folder().iterdir())


@pytest.mark.parametrize(
    ("source", "digest", "message"),
    [
        ("absent.pt", "", "absent.pt is not a file"),
        ("env:NOT_SET_ANYWHERE", "", "variable NOT_SET_ANYWHERE is not set"),
        ("https://example.org/weights.pt", "", "needs a digest"),
        ("file:///absent.pt", "sha256:" + 64 * "0", "cannot be fetched"),
        ("absent.pt", "md5:12", "digest 'md5:12': must be"),
    ],
)
def test_what_cannot_be_found_is_refused(source: str, digest: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        locate_weights(source, digest)


def test_only_tensors_are_read(tmp_path: Path) -> None:
    torch.save({"run": Path("anything")}, tmp_path / "objects.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("objects.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as weights"):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="holds a list"):
        read_weights(tmp_path / "list.pt")


def test_wrappers_and_prefixes_of_trainers_are_taken_off() -> None:
    inner = {"module.a": torch.zeros(1), "module.b": torch.zeros(1)}
    assert unwrapped({"state_dict": inner}).keys() == {"a", "b"}
    assert unwrapped({"a": torch.zeros(1), "module.b": torch.zeros(1)}).keys() == {"a", "module.b"}


def test_a_missing_a_left_over_and_an_odd_weight_are_named() -> None:
    norm = nn.BatchNorm1d(3)
    weights = dict(norm.state_dict())
    del weights["num_batches_tracked"]
    load_exactly(norm, weights, "file")
    with pytest.raises(ValueError, match="file: extra is unexpected"):
        load_exactly(norm, weights | {"extra": torch.zeros(1)}, "file")
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); the network's has \(3,\)"):
        load_exactly(norm, weights | {"bias": torch.zeros(4)}, "file")
    del weights["running_var"]
    with pytest.raises(ValueError, match="file: running_var is missing"):
        load_exactly(norm, weights, "file")
