"""Signals as exceptions, errors as one sentence and an exit code, and filtered warnings."""

from __future__ import annotations

import logging
import re
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
_OURS = Path(__file__).parents[1], Path(__file__).parents[2] / "evaluation"
_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # how many is data.reading.num_workers' business
    ".*LeafSpec.*",  # Lightning's own use of torch
    r".*module\(s\) in eval mode.*",  # the frozen tokenizer of a DiffusionSystem
    ".*already saved during checkpointing.*",  # a part's hyperparameters are its class_path
    ".*infer the batch indices.*",  # latents are keyed by clip
    ".*returned a view tensor.*",  # no loss writes into a sharded network's output
    ".*loftq_config. specified but will be ignored.*",  # a LoRA from YAML has all defaults
    ".*smaller than the logging interval.*",  # steps are counted here, not epochs
)
_FOR_USERS = ("StageFailed", "TooManyBadClips", "NonFiniteError")  # some come from worker processes


class Terminated(BaseException):
    """SIGTERM or SIGHUP ended the command."""

    def __init__(self, number: int, remedy: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{remedy}")
        self.exit_code = 128 + number


@contextmanager
def stopped_by_signals(saves: bool) -> Iterator[None]:
    """Raise ``Terminated`` on SIGTERM and SIGHUP within, unless they were ignored before.

    With ``saves`` SIGTERM is left to Lightning, which ends a training between two steps, and SIGHUP
    is treated as SIGTERM.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    def hang_up(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)

    handlers = {signal.SIGHUP: hang_up} if saves else {signal.SIGTERM: stop, signal.SIGHUP: stop}
    before = {number: signal.getsignal(number) for number in handlers}
    mine = [number for number in handlers if before[number] is signal.SIG_DFL]
    if current_thread() is not main_thread():
        mine = []
    for number in mine:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])


def exit_code(error: Exception) -> int | None:
    """Return the exit code for an error that its message explains; ``None`` for a defect, which
    keeps its traceback."""
    raised_in = _raised_in(error)
    ours = isinstance(error, ValueError) and _is_ours(raised_in)
    if ours or isinstance(error, FileNotFoundError) or _is_misconfiguration(error):
        return REFUSED
    callback = isinstance(error, RuntimeError) and raised_in.parent.match(
        "lightning/pytorch/callbacks"
    )
    if callback or isinstance(error, OSError) or type(error).__name__ in _FOR_USERS:
        return FAILED
    return None


def _raised_in(error: BaseException) -> Path:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename)


def _is_ours(file: Path) -> bool:
    return any(map(file.is_relative_to, _OURS))


@contextmanager
def refused_as(key: str, config: Any = None) -> Iterator[None]:
    """Turn what constructors refuse within, ours and Lightning's, into a ``ValueError`` that names
    ``key``, or the value's own key where only one of ``config`` can be meant."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, ValueError) or _is_misconfiguration(error)):
            raise
        cause = _first_cause(error)
        raise ValueError(at_its_key(cause, config) or f"{key}: {cause}") from error


def at_its_key(message: str, config: Any) -> str | None:
    """Return a constructor's message, which begins with ``name = value``, with the whole key of
    that name and value in ``config``. Return ``None`` where several keys have both, or none has.
    """
    name, equals, rest = message.partition(" = ")
    ends = re.compile(rf"(^|\.){re.escape(name)}$")
    found = [
        path
        for path, value in nodes(config)
        if ends.search(path) and rest.startswith((f"{value}", f"{value!r}"))
    ]
    return f"{found[0]}{equals}{rest}" if equals and len(found) == 1 else None


def nodes(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a configuration, at any depth, with its key, such as
    ``trainer.callbacks[0]``."""
    if path:
        yield path, config
    if isinstance(config, dict):
        for key, value in config.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from nodes(value, f"{path}[{index}]")


def _is_misconfiguration(error: BaseException) -> bool:
    return type(error).__name__ == "MisconfigurationException"  # Lightning is not imported for this


def _first_cause(error: BaseException) -> str:
    """Return the constructor's message, without those of jsonargparse's search: the outermost of
    ours, which may name what a library's message does not.
    """
    causes = [error]
    while isinstance(cause := causes[-1].__cause__ or causes[-1].__context__, ValueError):
        causes.append(cause)
    ours = (one for one in causes if _is_ours(_raised_in(one)))
    return " ".join(str(next(ours, causes[-1])).split())


def filter_warnings() -> None:
    """Filter the warnings of this process, and the tips among Lightning's messages."""
    for pattern in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
