"""Checksums and write access of files."""

import hashlib
import tempfile
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Make a folder. Raises ``ValueError`` naming it where no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to: {error.strerror}") from error
