"""SHA-256 hashes of clips: they are the keys of the latent cache, and tell whether a clip is still
the one that was indexed.
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
    """Hashes clips, be they a file or a part of a shard: each once in a process, for as long as
    its file's (of a litdata dataset, its ``index.json``'s) size, times and inode stay what they
    are. Beyond 262,144 of them the others are hashed anew.

    With ``verify`` a clip is served only after a look at all its bytes. Without it, size and time
    are believed where they are as recorded, and damage that leaves these as they are is not seen.
    """

    def __init__(self, verify: bool = False) -> None:
        self.verify = verify
        self._hashes: dict[bytes, bytes] = {}

    def of(self, record: ClipRecord) -> str:
        """The SHA-256 of a clip's bytes.

        It is the manifest's ``content`` where size and time of the file are still those that the
        manifest says, or the shard is remote; else all bytes are read. Raises ``DecodeError`` where
        they cannot be.
        """
        content = recorded(record)
        if content is not None and (is_remote(record) or _looks_unchanged(record)):
            return content
        return self._hash(record, None)

    def require_unchanged(self, record: ClipRecord, path: Path) -> None:
        """Raise ``DecodeError`` where a clip's bytes, which lie in the file ``path``, are not those
        that the manifest's ``content`` names.
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
        """Hash the file at ``path``, or the clip, wherever it lies, if that is None."""
        as_seen = repr((place_of(record), state(record))).encode()
        key = hashlib.blake2b(as_seen, digest_size=16).digest()
        if key not in self._hashes:
            if len(self._hashes) >= HASHES_KEPT:
                self._hashes.popitem()  # the last: what is asked for in turn would lose every one
            try:
                found = clip_sha256(record) if path is None else file_sha256(path)
            except OSError as error:
                raise DecodeError(f"{record.path}: {error.strerror or error}") from error
            self._hashes[key] = bytes.fromhex(found)
        return self._hashes[key].hex()


def recorded(record: ClipRecord) -> str | None:
    """The hash that the manifest tells, if it tells one."""
    content = record.columns.get("content")
    return content if isinstance(content, str) and content else None


def _looks_unchanged(record: ClipRecord) -> bool:
    columns = record.columns
    return (columns.get("num_bytes"), columns.get("modified_ns")) == stamp(record)
