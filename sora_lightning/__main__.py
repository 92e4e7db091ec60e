"""The table of commands, their common help, and their exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "fit": "train the model of an experiment: fit --config experiments/demo/tokenizer.yaml",
    "validate": "measure a checkpoint on the validation clips",
    "predict": "encode clips into latents with a trained tokenizer",
    "sample": "make videos from prompts with a checkpoint",
    "convert": "rename the weights of a public checkpoint, or ours to its names",
    "inspect": "show what a checkpoint says about the training that wrote it",
    "index": "probe the files of a manifest or folder, and fill in its technical columns",
    "split": "hold files of a manifest out of the training: train.jsonl and test.jsonl",
    "check": "show which clips a configuration leaves out, and why, and what its steps cost",
    "plan": "tokens, FLOPs, memory, GPU-hours and price of a model, before it trains",
    "train-expansion": "train the model that expands short prompts into descriptions",
    "synthesize": "render captioned clips of moving shapes",
    "simulate-captions": "caption rendered clips as a captioner with known faults would",
    "hide-captions": "copy a manifest with captions for a part of its clips",
    "curves": "draw the losses of all runs below a folder",
    "ablate": "train arms and seeds of an ablation, and compare their scores",
    "demo": "all of it, from rendered clips to scored videos",
    "frame-tasks": "train the demo's model on known frames, and measure what it does with them",
}
FUNCTIONS = {
    "sample": ("sora_lightning.cli.sample", "sample"),
    "convert": ("sora_lightning.cli.converting", "convert"),
    "inspect": ("sora_lightning.cli.inspecting", "inspect"),
    "index": ("sora_lightning.data.manifest.index", "index"),
    "split": ("sora_lightning.data.manifest.split", "split"),
    "check": ("sora_lightning.cli.check", "check"),
    "plan": ("sora_lightning.planner.command", "plan"),
    "train-expansion": ("sora_lightning.cli.expansion", "train_expansion"),
    "synthesize": ("sora_lightning.data.synthetic", "write_dataset"),
    "simulate-captions": ("sora_lightning.data.synthetic", "simulate_captions"),
    "hide-captions": ("sora_lightning.data.synthetic", "hide_captions"),
    "curves": ("sora_lightning.cli.curves", "curves"),
    "ablate": ("sora_lightning.ablations.command", "ablate"),
    "demo": ("sora_lightning.workflows.demo", "demo"),
    "frame-tasks": ("sora_lightning.workflows.frame_tasks", "frame_tasks"),
}

# Verbs of other programs, and what does here what they do there.
_ELSEWHERE = {
    "test": "to measure on held-out clips, give them to validate as --data.val_manifest; to score "
    "sampled videos, `make eval CKPT=...`",
    "eval": "`make eval CKPT=...`, or `python -m evaluation --help`",
    "train": "`sora-lightning fit`",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with its arguments and return the exit code: 0, 1 failed, 2 refused, 130
    interrupted, 143 terminated.

    What a user can put right is one message on stderr; anything else is a defect and keeps its
    traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(version("sora-lightning"))
        return 0
    from sora_lightning.cli.errors import (
        FAILED,
        INTERRUPTED,
        Terminated,
        exit_code,
        stopped_by_signals,
    )

    try:
        if any(argument.startswith("--trust") for argument in arguments):
            from sora_lightning.trust import pop_trusted

            arguments = pop_trusted(arguments)
        with stopped_by_signals(saves=arguments[0] == "fit"):
            _command(arguments[0])(arguments[1:])
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from here where it can", file=sys.stderr)
        return INTERRUPTED
    except Terminated as error:
        print(f"sora-lightning {arguments[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"sora-lightning {arguments[0]}: {error}", file=sys.stderr)
        return code
    return 0


def _command(name: str) -> Callable[[list[str]], object]:
    """Return the function that takes the arguments after a command; import only its modules."""
    if name in FUNCTIONS:
        from sora_lightning.cli.functions import run_function

        module, function = FUNCTIONS[name]
        return lambda arguments: run_function(
            f"sora-lightning {name}", getattr(import_module(module), function), arguments
        )
    if name in COMMANDS:
        from sora_lightning.cli.training import run_training

        return lambda arguments: run_training([name, *arguments])
    if name in _ELSEWHERE:
        raise ValueError(f"there is no such command: {_ELSEWHERE[name]}")
    from sora_lightning.cli.suggest import suggestion

    raise ValueError(f"there is no such command. {suggestion(name, COMMANDS)}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    more = "Arguments of a command: sora-lightning COMMAND --help\n"
    more += "Every command takes --trust PACKAGE: YAMLs and checkpoints may name classes of it too"
    return f"usage: sora-lightning [--version] COMMAND [arguments]\n\n{commands}\n\n{more}"


if __name__ == "__main__":
    sys.exit(main())
