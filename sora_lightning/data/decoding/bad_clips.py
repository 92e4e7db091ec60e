"""Records the clips that could not be read; too many of them are an error."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.manifest.records import ClipRecord

log = logging.getLogger(__name__)


class TooManyBadClips(DecodeError):
    """Raised where more clips cannot be read than ``max_bad_share`` allows."""

    def __init__(self, message: str) -> None:
        # A DataLoader's worker hands on its errors with their traceback in the message.
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class BadClips:
    """Names each bad clip once in a JSONL file (``clip_id, path, reason``), and in the log.

    Raises ``TooManyBadClips`` at the first clip beyond ``limit``. The clips of
    every process that writes to the file count; those that it named before the run do not.
    """

    def __init__(self, path: Path | None, limit: float = math.inf) -> None:
        self.path = path
        self.limit = limit
        self.reasons: dict[str, str] = {}
        self._offset = 0
        self._named = self._news()
        self._counted: set[str] = set()

    def __contains__(self, record: ClipRecord) -> bool:
        return record.clip_id in self.reasons

    def add(self, record: ClipRecord, error: Exception) -> None:
        self.reasons[record.clip_id] = str(error)
        log.warning("left out: %s", error)
        news = self._news()
        if self.path is not None and record.clip_id not in self._named | news:
            self._append(record, str(error))
        self._named |= news
        self._counted |= news | {record.clip_id}
        if len(self._counted) > self.limit:
            raise TooManyBadClips(
                f"{len(self._counted)} clips cannot be read, more than max_bad_share allows; "
                f"the last: {error}{'' if self.path is None else f'; all of them: {self.path}'}"
            )

    def _append(self, record: ClipRecord, reason: str) -> None:
        assert self.path is not None
        self._named.add(record.clip_id)
        row = {"clip_id": record.clip_id, "path": str(record.path), "reason": reason}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _news(self) -> set[str]:
        """Return the clips named in the file since the last call."""
        if self.path is None or not self.path.is_file():
            return set()
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return {json.loads(line)["clip_id"] for line in whole.splitlines() if line.strip()}
