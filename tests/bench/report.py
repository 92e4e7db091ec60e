"""Times candidates by turns in one process, beside the machine's own large matrix product."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_PRODUCT = "matrix product"
_PRODUCT_SIDE = 2048  # 8.6 GMAC: long enough that a call's overhead is nothing


@dataclass(frozen=True)
class Row:
    """One candidate's result. Times are medians in seconds; what does not apply is ``None``.

    ``share`` is the candidate's rate of multiply-accumulates over that of the matrix product in the
    same rounds; ``ratio`` is the first candidate's time over this one's: above 1 is faster.
    """

    section: str
    case: str
    candidate: str
    rounds: int
    median_s: float
    fastest_s: float
    ratio: float
    gmac_per_s: float | None
    share: float | None
    items_per_s: float | None
    unit: str

    def __str__(self) -> str:
        work = "" if self.gmac_per_s is None else f"{self.gmac_per_s:8.1f} GMAC/s"
        share = "" if self.share is None else f"{self.share:6.1%}"
        items = "" if self.items_per_s is None else f"{self.items_per_s:,.1f} {self.unit}/s"
        return (
            f"  {self.candidate:24} {1e3 * self.median_s:10.2f} ms {self.ratio:6.2f}x "
            f"{work:16}{share:8}{items}"
        ).rstrip()


class Report:
    """Rows as they are measured: printed at once, kept for the JSON file.

    ``seconds`` is what one case may take, all its candidates together; each runs at least
    ``min_rounds`` times all the same.
    """

    def __init__(self, seconds: float = 6.0, min_rounds: int = 3):
        self.seconds = seconds
        self.min_rounds = min_rounds
        self.section = ""
        self.rows: list[Row] = []
        a = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE)
        self._product = lambda: a @ a

    def compare(
        self,
        case: str,
        candidates: Mapping[str, Callable[[], object]],
        *,
        gmac: Mapping[str, float] | None = None,
        items: float | None = None,
        unit: str = "",
    ) -> dict[str, Row]:
        """Run the candidates by turns, a warm-up round first, and return their rows by name.

        ``gmac`` gives the billions of multiply-accumulates of one call of each candidate; with it
        the matrix product runs in every round too. ``items`` of ``unit`` are done in one call.
        """
        functions = dict(candidates)
        if gmac is not None:
            functions[_PRODUCT] = self._product
            gmac = {**gmac, _PRODUCT: _PRODUCT_SIDE**3 / 1e9}
        times = self._rounds(functions)
        return self._rows(case, times, gmac or {}, items, unit)

    def parts(self, case: str, times: Mapping[str, Sequence[float]]) -> dict[str, Row]:
        """Rows of seconds measured elsewhere: of a whole, which comes first, and of parts of it,
        whose share of all the whole's time is printed.
        """
        rows = self._rows(case, times, {}, None, "")
        whole, *parts = times
        for name in parts:
            print(f"  {name}: {sum(times[name]) / sum(times[whole]):.1%} of the {whole}")
        return rows

    def _rows(
        self,
        case: str,
        times: Mapping[str, Sequence[float]],
        gmac: Mapping[str, float],
        items: float | None,
        unit: str,
    ) -> dict[str, Row]:
        medians = {name: statistics.median(values) for name, values in times.items()}
        rates = {name: work / medians[name] for name, work in gmac.items()}
        names = [name for name in times if name != _PRODUCT]
        first = medians[names[0]]
        print(f"\n{self.section}: {case}")
        rows = {}
        for name in names:
            rate = rates.get(name)
            rows[name] = Row(
                section=self.section,
                case=case,
                candidate=name,
                rounds=len(times[name]),
                median_s=medians[name],
                fastest_s=min(times[name]),
                ratio=first / medians[name],
                gmac_per_s=rate,
                share=None if rate is None else rate / rates[_PRODUCT],
                items_per_s=None if items is None else items / medians[name],
                unit=unit,
            )
            print(rows[name], flush=True)
        self.rows += rows.values()
        return rows

    def _rounds(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(times[next(iter(times))]) < self.min_rounds:
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
        return times

    def write(self, path: Path) -> None:
        """All rows, and what they were measured with, as JSON; and beside it a table to read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        measured_with = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        rows = [asdict(row) for row in self.rows]
        path.write_text(json.dumps({**measured_with, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(self.table())

    def table(self) -> str:
        """The rows in Markdown; a dash stands for what does not apply."""
        lines = [
            "| section | case | candidate | median | to the first | share of product | rate |",
            "|---|---|---|--:|--:|--:|--:|",
        ]
        for row in self.rows:
            share = "–" if row.share is None else f"{row.share:.1%}"
            rate = "–" if row.items_per_s is None else f"{row.items_per_s:,.1f} {row.unit}/s"
            lines.append(
                f"| {row.section} | {row.case} | {row.candidate} | {1e3 * row.median_s:,.1f} ms "
                f"| {row.ratio:.2f}x | {share} | {rate} |"
            )
        return "\n".join(lines) + "\n"
