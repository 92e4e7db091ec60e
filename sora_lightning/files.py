"""Paths of this package's experiments; checksums, bounds and write access of files."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import yaml

from sora_lightning.checks import naming

PACKAGE = Path(__file__).parent
MOST_VALUES = 100_000  # in a YAML


def find_config(path: Path) -> Path:
    """Return the path of a YAML: as given, else that of an experiment of this package.

    ``experiments/demo/tokenizer.yaml``, ``demo/tokenizer.yaml`` and ``demo/tokenizer`` name the
    same one in any folder. A path that is neither is returned as it is.
    """
    if path.is_file():
        return path
    name = Path(*path.parts[1:]) if path.parts[:1] == ("experiments",) else path
    folders = (PACKAGE / "experiments", PACKAGE.parent / "experiments")  # in a wheel, in a checkout
    found = (folder / one for folder in folders for one in (name, name.with_suffix(".yaml")))
    return next((one for one in found if one.is_file()), path)


def check_archive(path: Path) -> None:
    """Raise ``ValueError`` for an archive that declares more bytes than its file holds: compressed,
    or with parts that overlap, it would fill the memory. ``torch.save`` writes none.
    """
    if is_zipfile(path):
        with ZipFile(path) as archive:
            declared = sum(part.file_size for part in archive.infolist())
        if declared > (held := path.stat().st_size):
            raise ValueError(f"it declares {declared:,} bytes, and the file has {held:,}")


def load_yaml(text: str) -> Any:
    """Return the values of a YAML document. Raises ``yaml.YAMLError`` as ``yaml.safe_load`` does,
    and for aliases that repeat values to more than ``MOST_VALUES``.
    """
    counted: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        if id(node) not in counted:
            counted[id(node)] = 1  # of an alias within itself
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = (one if isinstance(one, tuple) else (one,) for one in inner)
            counted[id(node)] += sum(count(one) for pair in pairs for one in pair)
        if "\0" in node.value:
            problem = "a value holds the character \\0, which no name or path can"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return counted[id(node)]

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if count(node) > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases repeat values to more than {MOST_VALUES:,}",
                problem_mark=node.start_mark,
            )
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    finally:
        loader.dispose()


def save_tensors(
    tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a file of safetensors."""
    from safetensors.torch import save_file  # here: it imports torch, which a --help need not

    save_file(dict(tensors), path, metadata)
    follow_umask(path)


def follow_umask(path: Path) -> None:
    """Give a file, or the files in a folder, the permissions of files that ``open`` makes:
    safetensors writes for the owner alone.
    """
    os.umask(umask := os.umask(0o077))
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(path: Path) -> None:
    """Make the folder of the file that ``--output`` names.

    Raises ``ValueError`` naming the path where the file could not be written.
    """
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder, and a file is written")
    with naming("--output"):
        check_writable(path.parent)


def check_new_folder(path: Path) -> None:
    """Raise ``ValueError`` if the folder that ``--output`` names exists or cannot be made."""
    if path.exists():
        raise ValueError(f"--output {path}: exists; name a folder to be made")
    with naming("--output"):
        check_writable(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to ``path`` when all is written: a process that is
    killed leaves no ``path``, and the next one removes what it left.
    """
    part = path.with_name(f".{path.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    yield part
    part.rename(path)


def check_writable(folder: Path) -> None:
    """Raise ``ValueError`` naming a folder, which need not exist, if no file can be put there."""
    path = folder.absolute()
    try:
        existing = next(one for one in (path, *path.parents) if one.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"1")
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(f"{folder}: cannot be written to: {reason}") from error
