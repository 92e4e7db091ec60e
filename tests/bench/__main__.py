"""``python -m tests.bench [section ...]``: run these sections, or all, and write the numbers."""

from __future__ import annotations

import argparse
import pkgutil
import time
from importlib import import_module
from pathlib import Path

import tests.bench
from tests.bench import latte
from tests.bench.report import Report

RESULTS = Path("experiments/results/bench")


def sections() -> list[str]:
    """The modules beside this one that have a section to run."""
    names = [module.name for module in pkgutil.iter_modules(tests.bench.__path__)]
    return sorted(set(names) - {"__main__", "gpu", "guard", "models", "report"})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(sections()))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and table")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case")
    parser.add_argument("--latte", type=Path, help="checkout of Vchitect/Latte")
    arguments = parser.parse_args(argv)
    for name in arguments.sections:
        if name not in sections():
            parser.error(f"there is no section {name}; there are {', '.join(sections())}")
    if arguments.latte is not None and not (arguments.latte / latte.SOURCE).is_file():
        parser.error(f"--latte {arguments.latte}: no checkout of Vchitect/Latte: no {latte.SOURCE}")
    checkouts = {"latte": arguments.latte} if arguments.latte else {}
    report = Report(seconds=arguments.seconds, checkouts=checkouts)
    for name in arguments.sections or sections():
        begun_s = time.perf_counter()
        report.section = name
        import_module(f"tests.bench.{name}").run(report)
        print(f"\n{name}: {time.perf_counter() - begun_s:.0f} s", flush=True)
        report.write(arguments.output)
    print(f"\n{len(report.rows)} rows in {arguments.output}")


if __name__ == "__main__":
    main()
