"""Checks of values that users set. Each raises a ``ValueError`` with the value and the rule."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

NUM_SEEDS = 2**32


def require_at_least(least: int, where: str = "", **values: float | None) -> None:
    """Check that no value is below ``least`` or NaN. ``None`` is not checked.

    The messages begin with ``where`` and the value's name.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            rule = f"must be at least {least}" if least else "must not be negative"
            raise ValueError(f"{where}{name} = {value}: {rule}")


def require_positive(where: str = "", **values: float | None) -> None:
    """Check that values are finite and above 0. ``None`` is not checked."""
    for name, value in values.items():
        if value is not None and not (value > 0 and isfinite(value)):
            raise ValueError(f"{where}{name} = {value}: must be positive")


def require_in(interval: str, where: str = "", **values: float | None) -> None:
    """Check that values lie in an interval, such as ``"[0, 1)"``. ``None`` is not checked."""
    low, high = map(float, interval[1:-1].split(","))
    for name, value in values.items():
        if value is None:
            continue
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{where}{name} = {value}: must lie in {interval}")


def require_seed(seed: int) -> None:
    """Check that a seed is one that numpy and torch both take."""
    if not 0 <= seed < NUM_SEEDS:
        raise ValueError(f"seed = {seed}: must be a whole number from 0 to {NUM_SEEDS - 1}")


def require_three(least: int, **values: Sequence[int]) -> None:
    """Check that each value is three numbers, not below ``least``: frames, rows, columns."""
    for name, value in values.items():
        if len(value) != 3 or min(value) < least:
            rule = "three positive numbers" if least == 1 else f"three numbers of at least {least}"
            raise ValueError(f"{name} = {list(value)} must be {rule}: frames, rows, columns")


def require_file(name: str, path: Path) -> None:
    """Check that a file exists. ``name`` is the flag or key that names it."""
    if not path.is_file():
        raise ValueError(f"{name} {path}: no such file")


def import_optional(module: str, user: str, extra: str = "reference") -> Any:
    """Import a module of a package that an extra of this distribution brings, for ``user``."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"{user} needs {package} ({error}): pip install 'sora-lightning[{extra}]'"
        ) from error


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Begin the message of a ``ValueError`` raised within by ``place``, such as ``f"{path}:"``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error
