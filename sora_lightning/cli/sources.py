"""Sources of a configuration: YAML files in the order given, then the keys of the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sora_lightning.cli.signatures import Signature, find_target
from sora_lightning.cli.suggest import suggestion
from sora_lightning.files import find_config, load_yaml


class CommandLineValue(str):
    """A value as typed, whose type the parser has yet to find."""


@dataclass(frozen=True)
class Source:
    """Values from one file or argument, and its name in messages."""

    name: str
    values: dict[str, Any]

    def holds(self, path: str) -> bool:
        """Return True if this source sets the key, such as ``a.b[0].c``."""
        node: Any = self.values
        for step in re.findall(r"[^.\[\]]+", path):
            if isinstance(node, list) and step.isdigit() and int(step) < len(node):
                node = node[int(step)]
            elif isinstance(node, dict) and step in node:
                node = node[step]
            elif step != "init_args":  # the command line may leave it out
                return False
        return True


def read_sources(argv: list[str]) -> list[Source]:
    """Return the sources of a configuration; later ones override earlier ones.

    Raises:
        ValueError: A ``--config`` file does not exist or is not a mapping in YAML.
    """
    sources, position = [], 0
    while position < len(argv):
        flag, equals, value = argv[position].partition("=")
        position += 1
        if not flag.startswith("-"):
            continue
        if not equals and position < len(argv) and not argv[position].startswith("--"):
            value, position = argv[position], position + 1
        if flag in ("-c", "--config"):
            sources.append(Source(f"in {value}", read_yaml(Path(value))))
        elif flag.startswith("--"):
            keys = flag[2:].removesuffix("+").split(".")
            sources.append(Source("on the command line", _nest(keys, CommandLineValue(value))))
    return sources


def with_found_configs(argv: list[str]) -> list[str]:
    """Return the arguments with the path of each ``--config`` (see ``find_config``)."""
    found, is_config = [], False
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if is_config:
            argument = str(find_config(Path(argument)))
        elif equals and flag in ("-c", "--config"):
            argument = f"{flag}={find_config(Path(value))}"
        is_config = argument in ("-c", "--config")
        found.append(argument)
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises ``ValueError`` with the file and, for a syntax error, the line.
    """
    if not path.is_file():
        known = [str(p) for p in Path("experiments").glob("**/*.yaml")]
        raise ValueError(f"--config {path}: no such file. {suggestion(str(path), known)}".rstrip())
    try:
        values = load_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8 ({error.reason})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: not YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{path}: not YAML: {error.reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def merge(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """Override ``base`` by ``delta``; drop arguments that a new class does not take.

    Keys of the command line may omit ``init_args``.
    """
    merged = dict(base)
    if "class_path" in merged and not set(delta) <= {"class_path", "init_args", "dict_kwargs"}:
        delta = {"init_args": delta}
    if delta.get("class_path", merged.get("class_path")) != merged.get("class_path"):
        merged["init_args"] = _still_valid(merged.get("init_args") or {}, str(delta["class_path"]))
    for key, value in delta.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge(old, value)
        elif isinstance(old, dict) and "class_path" in old and isinstance(value, str):
            merged[key] = merge(old, {"class_path": str(value)})
        else:
            merged[key] = value
    return merged


def _still_valid(arguments: dict[str, Any], class_path: str) -> dict[str, Any]:
    try:
        target = find_target(class_path)
    except ValueError:
        return {}
    return {k: v for k, v in arguments.items() if target and k in Signature.of(target).hints}


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value
