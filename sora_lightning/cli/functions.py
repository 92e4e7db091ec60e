"""A function's signature as a command line: its parameters are the flags, its docstring their
help.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from sora_lightning.cli.explain import condense, explain_refusal
from sora_lightning.cli.signatures import Signature
from sora_lightning.cli.suggest import suggestion
from sora_lightning.trust import trust_only_known_packages


def run_function(verb: str, function: Callable[..., Any], argv: list[str]) -> None:
    """Call ``function`` with the flags in ``argv``. Raises what ``parse_function`` raises."""
    function(**parse_function(verb, function, argv))


def parse_function(verb: str, function: Callable[..., Any], argv: list[str]) -> dict[str, Any]:
    """The arguments for ``function`` in ``argv``; ``--num-frames`` and ``--num_frames`` are the
    same.

    Raises:
        ValueError: A flag that the function does not take, one that it needs and is not there, or a
            value of a wrong type; says which.
    """
    trust_only_known_packages()
    parser = ArgumentParser(prog=f"sora-lightning {verb}", exit_on_error=False, allow_abbrev=False)
    parser.add_function_arguments(function)
    signature = Signature.of(function)
    given = [_name(argument) for argument in argv]
    for name in given:
        if name and name not in (*signature.hints, "help"):
            near = suggestion(_flag(name), [_flag(known) for known in signature.hints])
            raise ValueError(f"--{name}: no such argument. {near}")
    for name in signature.required:
        if name not in given and not {"help"} & set(given) and "-h" not in argv:
            raise ValueError(f"{_flag(name)} is missing: {verb} needs it")
    arguments = _plain(argv, signature)
    try:
        return parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        refused = condense(str(error))
        if "config" in signature.hints:  # a file that the function reads, not one of its arguments
            raise ValueError(refused) from error
        explained = explain_refusal(refused, arguments, signature.hints)
        raise ValueError(explained if explained == refused else _as_flag(explained)) from error


def _name(argument: str) -> str:
    """The parameter that a flag sets; nothing for a value."""
    flag = argument.partition("=")[0]
    return flag[2:].replace("-", "_") if flag.startswith("--") else ""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plain(argv: list[str], signature: Signature) -> list[str]:
    """The arguments as the parser knows them: underscores in names, and ``--switch`` for true."""
    plain = []
    for argument, following in zip_longest(argv, argv[1:]):
        name = _name(argument)
        written = f"--{name}{argument[len(name) + 2 :]}" if name else argument
        alone = "=" not in argument and (following is None or following.startswith("-"))
        plain.append(f"{written}=true" if alone and signature.hints.get(name) is bool else written)
    return plain


def _as_flag(explained: str) -> str:
    name, rest = explained.split(" ", 1)
    return f"{_flag(name)} {rest.removesuffix(' (on the command line)')}"
