"""Errors of files that do not decode, and guesses at the reason."""

from __future__ import annotations

from pathlib import Path

# Rows x columns of the largest frame that is decoded: a small file may declare gigabytes of pixels.
MAX_PIXELS = 2**26


class DecodeError(ValueError):
    """A file or its requested frames cannot be decoded. The message names the file."""


def require_decodable_size(path: Path, height: int, width: int) -> None:
    """Raise ``DecodeError`` for frames of more than ``MAX_PIXELS`` pixels."""
    if height * width > MAX_PIXELS:
        raise DecodeError(
            f"{path}: frames of {height}x{width}: at most {MAX_PIXELS} pixels are decoded"
        )


def looks_like(path: Path) -> str:
    """Guess what an unreadable file is, in brackets; an empty text if it cannot be opened."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError:
        return ""
    if not head:
        return " (the file is empty)"
    if head[4:8] == b"ftyp":
        return " (an mp4 without its index: cut short?)"
    text = head.decode("utf-8", errors="replace")  # its last letter may be cut in two
    if "\ufffd" not in text[:-1] and all(c.isprintable() or c.isspace() for c in text):
        return " (the file is text)"
    return " (no known container)"
