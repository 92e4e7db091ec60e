"""``python -m tests.bench.guard``: measures the key ratios anew, and fails where one has lost more
than 15 % of what ``experiments/results/bench`` holds.

A ratio compares two candidates in one process, by turns, so that the machine's load meets both. It
still varies: what has lost is measured again, and only what loses three times fails.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.bench import captions, denoisers, evaluation, layouts, packing, tokenizers
from tests.bench.__main__ import RESULTS
from tests.bench.report import Report, Row, read_results

LOSS, ATTEMPTS = 0.15, 3
GUARDED: dict[str, Sequence[Callable[[Report], object]]] = {
    "captions": [captions.run],
    "denoisers": [partial(denoisers.images, size="S")],
    "evaluation": [evaluation.given],
    "layouts": [partial(layouts.grow, frames=4), partial(layouts.grow, frames=16)],
    "packing": [partial(packing.mixed, layout="joint"), partial(packing.equal, layout="joint")],
    "tokenizers": [tokenizers.demo],
}


def losses(rows: Sequence[Row], committed: Sequence[Row]) -> list[str]:
    """Return a line for each ratio that is more than 15 % below the committed one, or where a case
    has one candidate its share of the matrix product, and for each row that is not committed.
    """
    before = {(row.section, row.case, row.candidate): row for row in committed}
    candidates = Counter((row.section, row.case) for row in rows)
    lines = []
    for row in rows:
        where = f"{row.section}: {row.case}, {row.candidate}"
        old = before.get((row.section, row.case, row.candidate))
        if old is None:
            lines.append(f"{where}: is not among the committed rows")
            continue
        name = "ratio" if candidates[row.section, row.case] > 1 else "share"
        now, then = getattr(row, name), getattr(old, name)
        if now is not None and then is not None and now < (1 - LOSS) * then:
            lines.append(f"{where}: {name} {now:.3f}, committed {then:.3f}")
    return lines


def guard(
    measures: Sequence[tuple[str, Callable[[Report], object]]],
    committed: Sequence[Row],
    seconds: float,
) -> list[str]:
    """Measure, again where something is lost, and return what was lost every time."""
    lost = []
    for section, measure in measures:
        for _ in range(ATTEMPTS):
            report = Report(seconds=seconds)
            report.section = section
            measure(report)
            if not (found := losses(report.rows, committed)):
                break
        lost += found
    return lost


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guard", description=__doc__)
    parser.add_argument("--committed", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case")
    arguments = parser.parse_args(argv)
    committed, _ = read_results(arguments.committed)
    if not committed:
        parser.error(f"{arguments.committed} holds no results: `make bench` writes them")
    measures = [(section, one) for section, several in GUARDED.items() for one in several]
    lost = guard(measures, committed, arguments.seconds)
    print("\n" + ("\n".join(["lost more than 15 %:", *lost]) if lost else "no ratio has lost 15 %"))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
