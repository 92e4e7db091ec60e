"""Paths of this package's experiments; checksums and write access of files."""

import hashlib
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent


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
    try:
        check_writable(path.parent)
    except ValueError as error:
        raise ValueError(f"--output {error}") from error


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
