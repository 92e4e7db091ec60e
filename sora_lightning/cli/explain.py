"""One sentence for each mistake in a refused configuration: the key, its file, its value, and what
is valid.

jsonargparse decides what is accepted; its message for a mistake deep within nested classes is a
block of nested attempts. After a refusal, this module walks the same files and arguments along the
signatures of the classes that they name, and reports every mistake it meets. What it cannot explain
comes back as jsonargparse put it, condensed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from sora_lightning.cli.signatures import Signature, callable_arity, find_target, item_hint, name_of
from sora_lightning.cli.sources import CommandLineValue, Source, merge, read_sources
from sora_lightning.cli.suggest import suggestion
from sora_lightning.trust import trust_only_known_packages

T = TypeVar("T")

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
# Lines of a jsonargparse message that say how it searched and not what is wrong.
_NOISE = re.compile(
    r"^(- )?(Does not validate against|Subtypes:|Errors:|Given value|"
    r"Expected a <class 'NoneType'>|$)"
)


class Mistake(NamedTuple):
    """An error in a configuration; ``path`` is its key as on the command line."""

    path: str
    sentence: str


def explain_refusal(
    message: str, argv: list[str], groups: Mapping[str, Any], linked: frozenset[str] = frozenset()
) -> str:
    """Return a line for each reason why ``argv`` (arguments after the command, with ``--config``)
    was refused.

    Args:
        message: What jsonargparse said.
        groups: The top-level keys and what each holds: a class whose parameters are its keys, or a
            type.
        linked: Keys that are filled in from others and hence are not missed.
    """
    sources = read_sources(argv)
    config: dict[str, Any] = {}
    for source in sources:
        config = merge(config, source.values)
    mistakes = [
        *_key_mistakes(config, dict.fromkeys(groups), "", "the configuration"),
        *(
            mistake
            for key in config
            if key in groups
            for mistake in _value_mistakes(config[key], groups[key], key, linked)
        ),
    ]
    lines = [f"{mistake.sentence}{_origin(mistake.path, sources)}" for mistake in mistakes]
    return "\n".join(lines) or condense(message)


def build(kind: type[T], values: Any, key: str = "") -> T:
    """Build a ``kind`` from the values of its parameters, as a YAML holds them.

    ``key`` is where the values stand; messages name the path from there. Raises ``ValueError`` for
    an unknown or missing key and a value of a wrong type, and passes on what constructors refuse.
    """
    trust_only_known_packages()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "built")
    if mistakes := list(_value_mistakes(values, kind, key, frozenset())):
        raise ValueError("\n".join(mistake.sentence for mistake in mistakes))
    try:
        return parser.instantiate(parser.parse_object({"built": values})).built
    except ArgumentError as error:
        raise ValueError(condense(str(error))) from error


def condense(message: str) -> str:
    """Remove the lines about its search from a message of jsonargparse."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if not _NOISE.match(line))


def _value_mistakes(value: Any, hint: Any, path: str, linked: frozenset[str]) -> Iterator[Mistake]:
    group = _group_class(hint)
    if isinstance(value, dict) and "class_path" in value:
        yield from _class_mistakes(value, hint, path, linked)
    elif isinstance(value, dict) and get_origin(hint) is dict and group is not None:
        for key, item in value.items():
            yield from _value_mistakes(item, group, _below(path, key), linked)
    elif isinstance(value, dict) and group is not None:
        yield from _parameter_mistakes(value, Signature.of(group), path, linked)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _value_mistakes(item, item_hint(hint), f"{path}[{index}]", linked)
    elif is_dataclass(hint) or not _accepts(hint, value):
        yield Mistake(path, f"{path or 'the file'} = {_shown(value)}: expected {name_of(hint)}")


def _class_mistakes(
    value: dict[str, Any], hint: Any, path: str, linked: frozenset[str]
) -> Iterator[Mistake]:
    found = list(
        _key_mistakes(value, dict.fromkeys(_CLASS_KEYS), path, "an object given by class_path")
    )
    class_path = str(value["class_path"])
    try:
        target = find_target(class_path)
    except ValueError as error:
        key = f"{path}.class_path"
        yield Mistake(key, f"{key} = {class_path!r}: {error}")
        return
    if target is not None:
        signature = Signature.of(target).without_first(callable_arity(hint))
        given = value.get("init_args") or {}
        found += _parameter_mistakes(given, signature, f"{path}.init_args", linked)
        if not found and "." in path and not _accepts(hint, value):
            expected = f"expected {name_of(hint)}"
            found.append(Mistake(path, f"{path}: {class_path} does not fit here: {expected}"))
    yield from found


def _parameter_mistakes(
    values: Any, signature: Signature, path: str, linked: frozenset[str]
) -> Iterator[Mistake]:
    if not isinstance(values, dict):
        sentence = f"{path} = {_shown(values)}: expected the parameters of {signature.name}"
        yield Mistake(path, sentence)
        return
    if not signature.takes_anything:
        yield from _key_mistakes(values, signature.hints, path, signature.name)
    for key, value in values.items():
        hint = signature.hints.get(key, Any)
        yield from _value_mistakes(value, hint, _below(path, key), linked)
    for key in signature.required:
        full = _below(path, key)
        if key not in values and full not in linked:
            yield Mistake(full, f"{full} is missing: {signature.name} needs it")


def _below(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _group_class(hint: Any) -> type | None:
    """Return the class whose parameters a dict without ``class_path`` gives: the hint itself, or
    the only dataclass of a union or of a dict's values.
    """
    if isinstance(hint, type) and hint.__module__ != "builtins":
        return hint
    members = [member for member in get_args(hint) if is_dataclass(member)]
    return members[0] if len(members) == 1 and isinstance(members[0], type) else None


def _key_mistakes(
    values: dict[str, Any], valid: Mapping[str, Any], path: str, owner: str
) -> Iterator[Mistake]:
    for key in values:
        if key not in valid:
            full = _below(path, key)
            sentence = f"{full}: no such key in {owner}. {suggestion(str(key), valid)}"
            yield Mistake(full, sentence)


def _accepts(hint: Any, value: Any) -> bool:
    if hint is Any or (isinstance(value, str) and "${" in value):
        return True
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
        if isinstance(value, CommandLineValue):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except ArgumentError:
        return False
    except ValueError:  # a type that jsonargparse has no parser for: nothing to say about it
        return True
    return True


def _origin(path: str, sources: list[Source]) -> str:
    for source in reversed(sources):
        if source.holds(path):
            return f" ({source.name})"
    return ""


def _shown(value: Any) -> str:
    return repr(str(value) if isinstance(value, str) else value)
