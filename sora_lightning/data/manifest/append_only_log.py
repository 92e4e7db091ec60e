"""Results of ``index`` for each file, appended to a file beside its output, so that an interrupted
call can resume. Memory holds only the offset of each line.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from sora_lightning.data.manifest.tables import Row

# A file's rows, or the reason why it has none.
Outcome = list[Row] | str


class AppendOnlyLog:
    """Lines of ``[key, path as given, outcome]``, the keys 32 hexadecimal digits.

    After calls of ``recall`` and ``add`` it is an iterable of the files' paths and outcomes, in the
    order of the calls of ``recall``. A line that an interruption cut is skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_recalled = 0
        self._places = array("q")  # of every file recalled; -1 for those that are to be added
        self._waiting = 0
        keys, places = bytearray(), array("q")
        path.touch()
        with path.open("rb+") as file:
            place, line = 0, b"\n"
            for line in file:
                with suppress(ValueError):
                    key, _, _ = json.loads(line)
                    keys += bytes.fromhex(key)
                    places.append(place)
                place += len(line)
            if not line.endswith(b"\n"):
                file.write(b"\n")
        found = np.frombuffer(bytes(keys), "S16")
        order = np.argsort(found, kind="stable")
        self._known, self._known_places = found[order], np.array(places, dtype=np.int64)[order]

    def recall(self, key: str) -> bool:
        """Return True if an earlier call logged a file's result; else ``add`` must follow."""
        asked = np.frombuffer(bytes.fromhex(key), "S16")
        (after,) = np.searchsorted(self._known, asked, side="right").tolist()
        known = after > 0 and self._known[after - 1] == asked[0]
        self._places.append(int(self._known_places[after - 1]) if known else -1)
        self.num_recalled += known
        return bool(known)

    def add(self, key: str, given: str, outcome: Outcome) -> int:
        """Append the first missing result. Return the number of results up to it."""
        self._waiting = self._places.index(-1, self._waiting)
        with self.path.open("ab") as file:
            self._places[self._waiting] = file.tell()
            file.write(json.dumps([key, given, outcome], ensure_ascii=False).encode() + b"\n")
        return self._waiting + 1

    def __iter__(self) -> Iterator[tuple[str, Outcome]]:
        with self.path.open("rb") as file:
            for place in self._places:
                file.seek(place)
                _, given, outcome = json.loads(file.readline())
                yield given, outcome
