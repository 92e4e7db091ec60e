"""Times candidates by turns in one process, beside the machine's own large matrix product."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_PRODUCT = "matrix product"
_PRODUCT_SIDE = 2048  # 8.6 GMAC: long enough that a call's overhead is nothing
_TABLE = "table.md"


@dataclass(frozen=True)
class Row:
    """One candidate's result. Times are medians in seconds; what does not apply is ``None``.

    ``ratio`` is the first candidate's time over this one's: above 1 is faster. ``ratio_low`` to
    ``ratio_high`` holds the middle half of that ratio's values in single rounds. ``share`` is the
    candidate's rate of multiply-accumulates over that of the matrix product in the same rounds;
    ``rate_ratio`` is that rate over the first candidate's: the ratio at equal work.
    """

    section: str
    case: str
    candidate: str
    rounds: int
    median_s: float
    fastest_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    gmac_per_s: float | None
    rate_ratio: float | None
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


@dataclass(frozen=True)
class Quantity:
    """A measured number that is no time, or is computed from several rows."""

    section: str
    case: str
    name: str
    value: float
    unit: str = ""


class Report:
    """Rows as they are measured: printed at once, kept for the JSON file of their section.

    ``seconds`` is what one case may take, all its candidates together; each runs at least
    ``min_rounds`` times all the same. ``checkouts`` holds folders of public code by name; rows of
    those that are missing are skipped. In every case the first candidate is what the others are
    compared with, so that a higher ratio is better.
    """

    def __init__(
        self,
        seconds: float = 2.0,
        min_rounds: int = 3,
        checkouts: Mapping[str, Path] | None = None,
    ):
        self.seconds = seconds
        self.min_rounds = min_rounds
        self.checkouts = checkouts or {}
        self.section = ""
        self.rows: list[Row] = []
        self.quantities: list[Quantity] = []
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
        rounds: int | None = None,
    ) -> dict[str, Row]:
        """Run the candidates by turns, a warm-up round first, and return their rows by name.

        ``gmac`` gives the billions of multiply-accumulates of one call of each candidate; with it
        the matrix product runs in every round too. ``items`` of ``unit`` are done in one call.
        ``rounds`` takes the place of the report's seconds where one call is very long.
        """
        functions = dict(candidates)
        if gmac is not None:
            functions[_PRODUCT] = self._product
            gmac = {**gmac, _PRODUCT: _PRODUCT_SIDE**3 / 1e9}
        times = self._rounds(functions, rounds)
        return self._rows(case, times, gmac or {}, items, unit)

    def measured(self, case: str, times: Mapping[str, Sequence[float]]) -> dict[str, Row]:
        """Rows of seconds measured elsewhere, by turns."""
        return self._rows(case, times, {}, None, "")

    def parts(self, case: str, times: Mapping[str, Sequence[float]]) -> dict[str, Row]:
        """Rows of seconds measured elsewhere: of a whole, which comes first, and of parts of it,
        whose share of all the whole's time is kept.
        """
        rows = self.measured(case, times)
        whole, *parts = times
        for name in parts:
            share = sum(times[name]) / sum(times[whole])
            self.quantity(case, f"{name}, of the {whole}", 100 * share, "%")
        return rows

    def quantity(self, case: str, name: str, value: float, unit: str = "") -> None:
        """Keep and print a number that is no time."""
        self.quantities.append(Quantity(self.section, case, name, value, unit))
        print(f"  {name}: {value:,.4g} {unit}".rstrip(), flush=True)

    def exponent(
        self,
        case: str,
        of: str,
        sizes: Sequence[float],
        costs: Sequence[float],
        cost: str = "time",
    ) -> None:
        """Keep the exponent of the costs in the sizes, by least squares on logarithms."""
        slope = statistics.linear_regression(
            [math.log(size) for size in sizes], [math.log(one) for one in costs]
        ).slope
        self.quantity(case, f"exponent of the {cost} in {of}", slope)

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
        first = names[0]
        print(f"\n{self.section}: {case}")
        rows = {}
        for name in names:
            rate = rates.get(name)
            low, high = _middle_half(times[first], times[name])
            rows[name] = Row(
                section=self.section,
                case=case,
                candidate=name,
                rounds=len(times[name]),
                median_s=medians[name],
                fastest_s=min(times[name]),
                ratio=medians[first] / medians[name],
                ratio_low=low,
                ratio_high=high,
                gmac_per_s=rate,
                rate_ratio=None if rate is None else rate / rates[first],
                share=None if rate is None else rate / rates[_PRODUCT],
                items_per_s=None if items is None else items / medians[name],
                unit=unit,
            )
            print(rows[name], flush=True)
        self.rows += rows.values()
        return rows

    def _rounds(
        self, functions: Mapping[str, Callable[[], object]], rounds: int | None
    ) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()
        end = time.perf_counter() + (self.seconds if rounds is None else 0)
        least = self.min_rounds if rounds is None else rounds
        while time.perf_counter() < end or len(times[next(iter(times))]) < least:
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
        return times

    def write(self, folder: Path) -> None:
        """Write a JSON file for each section that ran, with what it was measured with; and a table
        of all sections in the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        measured_with = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        }
        for section in {one.section for one in (*self.rows, *self.quantities)}:
            rows = [asdict(row) for row in self.rows if row.section == section]
            numbers = [asdict(one) for one in self.quantities if one.section == section]
            held = {**measured_with, "rows": rows, "quantities": numbers}
            (folder / f"{section}.json").write_text(json.dumps(held, indent=1) + "\n")
        (folder / _TABLE).write_text(_table(*read_results(folder)))


def read_results(folder: Path) -> tuple[list[Row], list[Quantity]]:
    """Return all rows and quantities that were written into a folder, section by section."""
    rows, quantities = [], []
    for path in sorted(folder.glob("*.json")):
        held = json.loads(path.read_text())
        rows += [Row(**row) for row in held["rows"]]
        quantities += [Quantity(**one) for one in held["quantities"]]
    return rows, quantities


def _middle_half(first: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the quartiles of the ratios of single rounds."""
    ratios = [one / two for one, two in zip(first, other, strict=True)]
    low, _, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4)
    return low, high


def _table(rows: Sequence[Row], quantities: Sequence[Quantity]) -> str:
    """Return the rows in Markdown; a dash stands for what does not apply."""
    lines = [
        "| section | case | candidate | median | to the first (middle half) | at equal work "
        "| share of product | rate |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        spread = f"{row.ratio:.2f}x ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        equal = "–" if row.rate_ratio is None else f"{row.rate_ratio:.2f}x"
        share = "–" if row.share is None else f"{row.share:.1%}"
        rate = "–" if row.items_per_s is None else f"{row.items_per_s:,.1f} {row.unit}/s"
        lines.append(
            f"| {row.section} | {row.case} | {row.candidate} | {1e3 * row.median_s:,.1f} ms "
            f"| {spread} | {equal} | {share} | {rate} |"
        )
    lines += ["", "| section | case | quantity | value |", "|---|---|---|--:|"]
    for one in quantities:
        value = f"{one.value:,.4g} {one.unit}".rstrip()
        lines.append(f"| {one.section} | {one.case} | {one.name} | {value} |")
    return "\n".join(lines) + "\n"
