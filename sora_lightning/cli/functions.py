"""A function's signature as a command line: its parameters are the flags, its docstring their
help.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from itertools import zip_longest
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from sora_lightning.cli.errors import exit_code
from sora_lightning.cli.explain import condense, explain_refusal
from sora_lightning.cli.signatures import Signature
from sora_lightning.cli.suggest import suggestion
from sora_lightning.trust import trust_only_known_packages


def run_function(program: str, function: Callable[..., Any], argv: list[str]) -> None:
    """Call ``function`` with the flags in ``argv``.

    Raises what ``parse_function`` raises. A ``ValueError`` of the function names the flags that
    were typed in place of its parameters.
    """
    arguments = parse_function(program, function, argv)
    try:
        function(**arguments)
    except ValueError as error:
        if exit_code(error) is None:  # a defect
            raise
        signature = Signature.of(function)
        paths = _paths(dict(_fields(signature.hints)))
        typed = _typed(_with_first_flag(argv, signature), paths)
        message = _as_flags(str(error), typed)
        if message == str(error):
            raise
        raise ValueError(message) from error


def parse_function(program: str, function: Callable[..., Any], argv: list[str]) -> dict[str, Any]:
    """Parse the arguments for ``function``; ``--num-frames`` and ``--num_frames`` are the same, and
    a value before all flags is the function's first required parameter.

    A field of a dataclass parameter is given by its path, ``--sampling.guidance.scale``, or by any
    ending of it that no other has, joined by dashes: ``--guidance-scale``.

    Raises:
        ValueError: A flag that the function does not take, one that it needs and is not there, or a
            value of a wrong type; says which.
    """
    trust_only_known_packages()
    # The first paragraph: jsonargparse takes its first line alone, as the title of a group.
    about = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
    parser = ArgumentParser(
        prog=program, description=about, exit_on_error=False, allow_abbrev=False
    )
    parser.add_function_arguments(function, as_group=False)
    signature = Signature.of(function)
    hints = dict(_fields(signature.hints))
    paths = _paths(hints)
    argv = _with_first_flag(argv, signature)
    given = [_name(argument) for argument in argv]
    for argument, name in zip(argv, given, strict=True):
        if name and name not in (*paths, "help"):
            near = suggestion(_flag(name), [_flag(known) for known in paths])
            raise ValueError(f"{argument.partition('=')[0]}: no such argument. {near}")
        # As elsewhere the last one of a flag counts; of --config, of which fit takes several, a
        # user would expect both.
        if name == "config" and given.count(name) > 1:
            delta = "; a YAML that varies it is given as --delta" if "delta" in paths else ""
            raise ValueError(f"--config is given twice: {program} takes one{delta}")
    for name in signature.required:
        is_group = _group(signature.hints[name]) is not None
        if not (is_group or name in given or {"help"} & set(given) or "-h" in argv):
            raise ValueError(f"{_flag(name)} is missing: {program} needs it")
    # The help shows flags with dashes, and each nested flag's short form beside its path.
    for action in parser._actions:
        if action.dest in hints:
            _, dot, ending = action.dest.partition(".")
            others = action.option_strings if dot else []
            action.option_strings = [_flag(ending or action.dest), *others]
    arguments = _plain(argv, hints, paths)
    typed = _typed(argv, paths)
    try:
        return parser.instantiate(parser.parse_args(arguments)).as_dict()
    except ArgumentError as error:
        refused = condense(str(error))
        if "config" in signature.hints:  # a file that the function reads, not one of its arguments
            raise ValueError(refused) from error
        explained = explain_refusal(refused, arguments, signature.hints)
        explained = explained.removesuffix(" (on the command line)")
        raise ValueError(_as_flags(explained, typed)) from error
    except ValueError as error:  # what a dataclass refuses
        raise ValueError(_as_flags(condense(str(error)), typed)) from error


def _with_first_flag(argv: list[str], signature: Signature) -> list[str]:
    """Return the arguments with the first required parameter's flag before a value without one."""
    if argv and not argv[0].startswith("-") and signature.required:
        return [_flag(signature.required[0]), *argv]
    return argv


def _group(hint: Any) -> Any:
    """Return the dataclass in a parameter's type, else ``None``."""
    return next((one for one in (hint, *typing.get_args(hint)) if is_dataclass(one)), None)


def _fields(hints: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return the types of parameters and of the fields of dataclasses, by dotted path."""
    for name, hint in hints.items():
        yield prefix + name, hint
        if (group := _group(hint)) is not None:
            yield from _fields(Signature.of(group).hints, f"{prefix}{name}.")


def _paths(hints: Mapping[str, Any]) -> dict[str, str]:
    """Return the path of each name: a full path, or an ending that no other path has."""
    endings: dict[str, list[str]] = {}
    for path in hints:
        steps = path.split(".")
        for start in range(1, len(steps)):
            endings.setdefault("_".join(steps[start:]), []).append(path)
    short = {name: paths[0] for name, paths in endings.items() if len(paths) == 1}
    return short | {path: path for path in hints}


def _name(argument: str) -> str:
    """Return the parameter that a flag sets; an empty string for a value."""
    flag = argument.partition("=")[0]
    return flag[2:].replace("-", "_") if flag.startswith("--") else ""


def _typed(argv: list[str], paths: Mapping[str, str]) -> dict[str, str]:
    """Return the flags in ``argv``, as typed, by the paths that they set."""
    flags = ((_name(argument), argument.partition("=")[0]) for argument in argv)
    return {paths[name]: flag for name, flag in flags if name in paths}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-').replace('.', '-')}"


def _plain(argv: list[str], hints: Mapping[str, Any], paths: Mapping[str, str]) -> list[str]:
    """Return the arguments as the parser takes them: full paths, ``--switch`` for true, ``1,2``
    for a tuple.
    """
    plain: list[str] = []
    before: Any = None  # type of the flag whose value comes next
    for argument, following in zip_longest(argv, argv[1:]):
        name = _name(argument)
        if not name:
            plain.append(_bracketed(argument, before))
            before = None
            continue
        path = paths.get(name, name)
        hint = hints.get(path)
        _, equals, value = argument.partition("=")
        if equals:
            plain.append(f"--{path}={_bracketed(value, hint)}")
        elif hint is bool and (following is None or following.startswith("-")):
            plain.append(f"--{path}=true")
        else:
            plain.append(f"--{path}")
            before = hint
    return plain


def _bracketed(value: str, hint: Any) -> str:
    is_tuple = typing.get_origin(hint) is tuple and not value.startswith(("[", "("))
    return f"[{value}]" if is_tuple else value


def _as_flags(message: str, typed: Mapping[str, str]) -> str:
    """Return the message with flags, as they were typed, in place of the keys that they set."""
    for path, flag in typed.items():
        for key in filter(None, (path, path.partition(".")[2])):
            start = r"(?<![\w.-])" if "." in key else "(?:^|(?<=, ))"
            pattern = rf"{start}{re.escape(key)}\b(?![.\w-])( =(?= [^']))?"
            message = re.sub(pattern, flag, message)
    return message
