"""The classes that a file may name: one rule for checkpoints, converted weights and YAMLs.

Building a class runs its code, and importing a module runs the module's. jsonargparse applies the
rule to every import path among the values that it parses, also where a string names a function
and where an allowed module only re-exports something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings

from sora_lightning.files import PACKAGE

PACKAGES = (
    "sora_lightning",
    "evaluation",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch",
    "lightning.fabric",
    "torchmetrics",
    "peft",
    "transformers",
    "diffusers",
)


_trusted = set(PACKAGES)  # of the process, as jsonargparse's own settings are


def trust_only_known_packages(*more: str) -> None:
    """Let jsonargparse import from ``PACKAGES``, ``more`` and what was trusted before, no others.

    A ``class_path`` given where any value fits stays the plain dict that it is.
    """
    _trusted.update(more)
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=sorted(_trusted),
    )


def check_class_path(path: str) -> None:
    """Raise ``ValueError`` for an import path that a file may not name; import nothing."""
    trust_only_known_packages()
    steps = path.split(".")
    if steps[0] == "evaluation":
        check_evaluation()
    if not any(".".join(steps[:count]) in _trusted for count in range(1, len(steps) + 1)):
        raise ValueError(
            f"{path} is not built: a file may name classes of {', '.join(PACKAGES)}. "
            f"If you trust its author, add --trust {path.split('.')[0]}"
        )


def import_class(path: str) -> Any:
    """Import the class or function that a file names. ``ValueError`` if it may not name it."""
    check_class_path(path)
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be imported ({error})") from error


def check_evaluation() -> None:
    """Raise ``ValueError`` where the package ``evaluation`` that Python finds is not the one that
    was installed beside this one.
    """
    ours, found = PACKAGE.parent / "evaluation" / "__init__.py", find_spec("evaluation")
    where = None if found is None else found.origin
    if where is None or not Path(where).samefile(ours):
        raise ValueError(
            f"the package evaluation that Python finds is {where}, not {ours}: rename it, or start "
            "from another folder"
        )
    if "sora_lightning" not in ours.read_text(encoding="utf-8"):
        raise ValueError(
            f"{ours} was overwritten by another distribution with a package evaluation: uninstall "
            "that, and install sora-lightning again"
        )


def check_class_paths(configuration: Any) -> None:
    """Raise ``ValueError`` for the first ``class_path`` within that a file may not name."""
    for path in class_paths(configuration):
        check_class_path(path)


def pop_trusted(arguments: list[str]) -> list[str]:
    """Trust the packages given by ``--trust NAME``, and return the other arguments."""
    left, names, position = [], [], 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        position += 1
        if flag != "--trust":
            left.append(arguments[position - 1])
            continue
        if not equals and position < len(arguments):
            value, position = arguments[position], position + 1
        if not all(part.isidentifier() for part in value.split(".")):
            raise ValueError(f"--trust {value}: give the name of a Python package")
        names.append(value)
    if names:
        trust_only_known_packages(*names)
    return left


def class_paths(value: Any) -> Iterator[str]:
    """Yield every ``class_path`` within a configuration."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield str(value["class_path"])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from class_paths(item)
