"""Rules over the columns of a manifest, such as ``motion > 0.2``, that select clips."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sora_lightning.data.manifest.records import ClipRecord

_COMPARISONS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_RULE = re.compile(r"\s*(\w+)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*")


@dataclass(frozen=True)
class Filter:
    """Rule ``column comparison value``. Clips for which it does not hold are removed, as are clips
    without a value in the column.
    """

    column: str
    comparison: str
    bound: float | str

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read one of ``> >= < <= == !=`` between a column and a number or a text, quoted or not.

        Raises ``ValueError`` for anything else.
        """
        match = _RULE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"filter {text!r}: must be column, one of {' '.join(_COMPARISONS)}, and a value, "
                "e.g. motion > 0.2"
            )
        column, comparison, value = match.groups()
        try:
            bound: float | str = float(value)
        except ValueError:
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            bound = value[1:-1] if quoted else value
            if comparison not in ("==", "!="):
                raise ValueError(
                    f"filter {text!r}: {value} is no number, and {comparison} needs one"
                ) from None
        if bound != bound:
            raise ValueError(f"filter {text!r}: nothing compares with nan")
        return cls(column, comparison, bound)

    def __str__(self) -> str:
        bound = f"{self.bound:g}" if isinstance(self.bound, float) else repr(self.bound)
        return f"{self.column} {self.comparison} {bound}"

    @property
    def value(self) -> str:
        """Return the reason that a report gives for the clips that it removes."""
        return f"filter: not {self}"

    def keeps(self, record: ClipRecord) -> bool:
        """Return True if a row is kept. ``ValueError`` for a text compared with a number."""
        value = columns_of(record).get(self.column)
        if value is None or value != value:
            return False
        if isinstance(self.bound, float) and not isinstance(value, (bool, int, float)):
            raise ValueError(
                f"filter {str(self)!r}: {self.column} = {value!r} of {record.path} is no number"
            )
        if isinstance(self.bound, str):
            value = str(value)
        return bool(_COMPARISONS[self.comparison](value, self.bound))


def columns_of(record: ClipRecord) -> dict[str, Any]:
    """Return the columns of a clip's row, and ``duration_s``, the length of its window, if it is
    known.
    """
    columns = dict(record.columns)
    length_s = record.metadata.duration_s if record.metadata else math.inf
    duration_s = min(record.end_s, length_s) - record.start_s
    if math.isfinite(duration_s):
        columns.setdefault("duration_s", duration_s)
    return columns


def require_columns(records: Sequence[ClipRecord], filters: Sequence[Filter]) -> None:
    """Raise ``ValueError`` for a column that no row has."""
    for rule in filters:
        if not any(rule.column in columns_of(record) for record in records):
            known = sorted({name for record in records for name in columns_of(record)})
            raise ValueError(
                f"filter {str(rule)!r}: no row has a column {rule.column}; "
                f"there are {', '.join(known)}"
            )


def first_against(record: ClipRecord, filters: Sequence[Filter]) -> Filter | None:
    """Return the first filter that removes a clip; ``None`` if all keep it."""
    return next((rule for rule in filters if not rule.keeps(record)), None)


def sift(
    records: Sequence[ClipRecord], filters: Sequence[Filter]
) -> tuple[list[ClipRecord], list[tuple[ClipRecord, Filter]]]:
    """Return the clips that every filter keeps, and the others, each with the first that removes
    it.

    Raises ``ValueError`` for a column that no row has.
    """
    require_columns(records, filters)
    kept, removed = [], []
    for record in records:
        against = first_against(record, filters)
        if against is None:
            kept.append(record)
        else:
            removed.append((record, against))
    return kept, removed
