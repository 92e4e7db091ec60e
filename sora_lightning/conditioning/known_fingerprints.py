"""Fingerprints of frozen encoders beside their embeddings, so that weights need not be read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4


@dataclass(frozen=True)
class KnownFingerprint:
    """A file with the fingerprint of an encoder. It is named by what the encoder is made of."""

    path: Path

    @classmethod
    def of(cls, folder: Path, facts: str, *sources: Path) -> KnownFingerprint:
        """Return the file below ``folder`` of an encoder that ``facts`` describe.

        ``sources`` are the folders that it is read from. Any change of a file's name, size or time
        gives another one; contents are not read.
        """
        files = [path for source in sources for path in sorted(source.rglob("*")) if path.is_file()]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        name = hashlib.sha256(json.dumps([facts, stats]).encode()).hexdigest()
        return cls(folder / "fingerprints" / name)

    def read(self) -> str | None:
        """Return the fingerprint, or ``None`` where it is not known."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        return text if len(text) == 64 else None

    def write(self, fingerprint: str) -> None:
        """Write the fingerprint, if it is not known."""
        if self.read() is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{uuid4().hex}")
        partial.write_text(fingerprint)
        partial.replace(self.path)
