"""Checksums and write access of files."""

import hashlib
import tempfile
from pathlib import Path


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
    """Make a folder. Raises ``ValueError`` naming it where no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(f"{folder}: cannot be written to: {reason}") from error
