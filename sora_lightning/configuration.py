"""Configurations of parts that were built in Python, for checkpoints that build them again."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Self


class KeepsArguments:
    """Base of parts that keep the ``arguments`` of their constructor, for ``configuration``.

    Frozen dataclasses need no such base: their fields are their arguments.
    """

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        # Past nn.Module.__setattr__: its constructor has not run.
        self.__dict__["arguments"] = dict(list(bound.arguments.items())[1:])
        return self


def configuration(value: Any, key: str) -> Any:
    """Return plain values, and a ``class_path`` with ``init_args`` in place of each object.

    Raises ``ValueError`` naming ``key`` for what no file can describe: a lambda, a class that is
    defined within a function or in a script, an object that does not keep its arguments.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [configuration(one, f"{key}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, dict):
        return {name: configuration(one, f"{key}.{name}") for name, one in value.items()}
    if isinstance(value, FunctionType | type):
        return _import_path(value, key)
    if (specification := getattr(value, "specification", None)) is not None:
        return specification
    made_by, arguments = _construction(value)
    if arguments is None:
        raise ValueError(
            f"{key} = {value!r}"[:200]
            + f": a {type(value).__name__} cannot be kept in a checkpoint, "
            "since it does not keep its arguments: give a part of this package, a frozen "
            "dataclass, a functools.partial of a class with keywords, or a subclass of "
            "sora_lightning.configuration.KeepsArguments"
        )
    path = _import_path(made_by, key)
    return {"class_path": path, "init_args": configuration(arguments, key)}


def _construction(value: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return what built an object, and its arguments; ``None`` where they are not known."""
    if isinstance(value, partial):
        if value.func.__module__.startswith("jsonargparse"):  # its factories end with the class
            return value.args[-1], value.keywords
        return value.func, None if value.args else value.keywords
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.init]
        return type(value), {name: getattr(value, name) for name in names}
    # Imported here: every process that decodes would pay its half second.
    from torch.distributed.fsdp import FSDPModule

    kind = type(value)
    if issubclass(kind, FSDPModule):  # fully_shard changes a module's class to a subclass
        kind = kind.__bases__[-1]
    return kind, getattr(value, "arguments", None)


def _import_path(made_by: Any, key: str) -> str:
    if made_by.__module__ == "__main__" or not made_by.__qualname__.isidentifier():
        raise ValueError(
            f"{key}: {made_by.__qualname__} of {made_by.__module__} cannot be imported by a "
            "checkpoint's reader: define it at the top of a module"
        )
    return f"{made_by.__module__}.{made_by.__qualname__}"
