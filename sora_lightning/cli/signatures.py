"""Parameters of a class or function named in a YAML, read from its signature."""

from __future__ import annotations

import importlib.util
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

from sora_lightning.cli.suggest import suggestion
from sora_lightning.trust import check_class_path

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}


@dataclass(frozen=True)
class Signature:
    """Parameters of a class or function: their names, types, and which are required.

    ``takes_anything`` is True if it has ``**kwargs``, so that an unknown name may be valid.
    """

    name: str
    hints: dict[str, Any]
    required: tuple[str, ...]
    takes_anything: bool

    @classmethod
    def of(cls, target: Callable[..., Any]) -> Signature:
        function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        try:
            types = typing.get_type_hints(function)
        except (NameError, TypeError):  # a name imported for type checking alone
            types = {}
        parameters = inspect.signature(target).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return cls(
            name=getattr(target, "__name__", str(target)),
            hints={p.name: types.get(p.name, Any) for p in named},
            required=tuple(p.name for p in named if p.default is p.empty),
            takes_anything=any(p.kind is p.VAR_KEYWORD for p in parameters),
        )

    def without_first(self, count: int) -> Signature:
        """Return the signature without the first ``count`` parameters, given by position."""
        given = set(list(self.hints)[:count])
        hints = {name: hint for name, hint in self.hints.items() if name not in given}
        required = tuple(name for name in self.required if name not in given)
        return replace(self, hints=hints, required=required)


def find_target(class_path: str) -> Callable[..., Any] | None:
    """Import a class or function; return ``None`` for a short name, which only the parser resolves.

    Raises:
        ValueError: A file may not name it, or the module or the name in it does not exist; says
            which, and the nearest that does.
    """
    module_path, _, name = class_path.rpartition(".")
    if not module_path:
        return None
    if importlib.util.find_spec(module_path.partition(".")[0]) is None:
        raise ValueError(f"there is no module {module_path}")
    check_class_path(class_path)
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name and not module_path.startswith(error.name):
            raise
        raise ValueError(f"there is no module {module_path}") from error
    if not hasattr(module, name):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"{module_path} has no {name}. {suggestion(name, public)}".rstrip())
    return getattr(module, name)


def callable_arity(hint: Any) -> int:
    """Return the number of positional arguments of a ``Callable[[...], X]``, 0 for other types."""
    for option in (hint, *typing.get_args(hint)):
        arguments = typing.get_args(option)
        if typing.get_origin(option) is Callable and arguments and isinstance(arguments[0], list):
            return len(arguments[0])
    return 0


def item_hint(hint: Any) -> Any:
    """Return the type of a list's items, ``Any`` if ``hint`` admits no list."""
    for option in (hint, *typing.get_args(hint)):
        if typing.get_origin(option) in (list, tuple, Iterable) and typing.get_args(option):
            return typing.get_args(option)[0]
    return Any


def name_of(hint: Any) -> str:
    """Describe a type in the words of YAML."""
    if hint in _NAMES:
        return _NAMES[hint]
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(map(name_of, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is Callable and typing.get_args(hint):
        return name_of(typing.get_args(hint)[-1])
    if is_dataclass(hint) and isinstance(hint, type):
        return f"the parameters of {hint.__name__}"
    if isinstance(hint, type) and not typing.get_args(hint):
        return f"a {hint.__name__}, given by class_path and init_args"
    return re.sub(r"\b[a-z_]\w*\.(?=\w)", "", str(hint))
