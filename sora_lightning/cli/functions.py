"""A function's signature as a command line: its parameters are the flags, its docstring is their
help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from sora_lightning.cli.explain import explain_refusal
from sora_lightning.cli.signatures import Signature
from sora_lightning.cli.suggest import suggestion


def run_function(verb: str, function: Callable[..., Any], argv: list[str]) -> None:
    """Call ``function`` with the flags in ``argv``; ``--num-frames`` and ``--num_frames`` are the
    same flag.

    Raises:
        ValueError: A flag that the function does not take, one that it needs and is not there, or a
            wrong type.
    """
    parser = ArgumentParser(prog=f"sora-lightning {verb}", exit_on_error=False, allow_abbrev=False)
    parser.add_function_arguments(function)
    valid = Signature.of(function).hints
    arguments = [_with_underscores(argument) for argument in argv]
    for argument in arguments:
        flag = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and flag not in (*valid, "help"):
            raise ValueError(f"{argument}: no such argument. {suggestion(flag, valid)}")
    try:
        values = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(explain_refusal(str(error), arguments, valid)) from error
    function(**values.as_dict())


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"
