"""SHA-256 hashes of clips: keys of the latent cache, and a check that a clip is still the one that
was indexed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.shards import clip_sha256, is_remote, place_of, stamp, state
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.files import file_sha256

# Of so many files the hash is kept, in about 50 MiB.
HASHES_KEPT = 2**18


class Checksums:
    """Hashes clips, each a file or a part of a shard, once in a process while size, times and inode
    of its file (of a litdata dataset, its ``index.json``) are unchanged. At most 262,144 hashes are
    kept.

    With ``verify`` all bytes of a clip are read before it is served. Without it, a clip with the
    recorded size and time is not read, and damage that leaves both unchanged is not noticed.
    """

    def __init__(self, verify: bool = False) -> None:
        self.verify = verify
        self._hashes: dict[bytes, bytes] = {}

    def of(self, record: ClipRecord) -> str:
        """Return the SHA-256 of a clip's bytes.

        It is the manifest's ``content`` if size and time of the file are those in the manifest,
        or if the shard is remote; else all bytes are read. Raises ``DecodeError`` if they cannot
        be read.
        """
        content = recorded(record)
        if content is not None and (is_remote(record) or _looks_unchanged(record)):
            return content
        return self._hash(record, None)

    def require_unchanged(self, record: ClipRecord, path: Path) -> None:
        """Raise ``DecodeError`` if the hash of a clip's bytes in the file ``path`` is not the
        manifest's ``content``.
        """
        content = recorded(record)
        if content is None:
            return
        if (self._hash(record, path) if self.verify else self.of(record)) == content:
            return
        if self.verify and _looks_unchanged(record):
            raise DecodeError(
                f"{record.path}: is damaged: its bytes are not those that were indexed, though "
                "their number and the file's time are"
            )
        raise DecodeError(f"{record.path}: has changed since it was indexed: index it again")

    def _hash(self, record: ClipRecord, path: Path | None) -> str:
        """Hash the file at ``path``, or the clip if ``path`` is ``None``."""
        as_seen = repr((place_of(record), state(record))).encode()
        key = hashlib.blake2b(as_seen, digest_size=16).digest()
        if key not in self._hashes:
            if len(self._hashes) >= HASHES_KEPT:
                self._hashes.popitem()  # the last: a cyclic order of clips would evict every one
            try:
                found = clip_sha256(record) if path is None else file_sha256(path)
            except OSError as error:
                raise DecodeError(f"{record.path}: {error.strerror or error}") from error
            self._hashes[key] = bytes.fromhex(found)
        return self._hashes[key].hex()


def recorded(record: ClipRecord) -> str | None:
    """Return the hash in the manifest, if there is one."""
    content = record.columns.get("content")
    return content if isinstance(content, str) and content else None


def _looks_unchanged(record: ClipRecord) -> bool:
    columns = record.columns
    return (columns.get("num_bytes"), columns.get("modified_ns")) == stamp(record)
