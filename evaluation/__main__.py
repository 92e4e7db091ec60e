"""Command line of the evaluation.

``python -m evaluation`` scores, ``compare`` compares reports, ``tasks`` measures generation from
known frames, and ``train-tiny`` trains the small networks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sora_lightning.trust import pop_trusted

_REFUSED, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for a user's error, 130 if interrupted."""
    arguments = pop_trusted(list(sys.argv[1:] if argv is None else argv))
    verb = arguments[0] if arguments and arguments[0] in _VERBS else ""
    parser, run = {**_VERBS, "": (_parser, _evaluate)}[verb]
    parsed = parser().parse_args(arguments[1:] if verb else arguments)
    try:
        run(parsed)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command resumes sampling",
            file=sys.stderr,
        )
        return _INTERRUPTED
    except ValueError as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return _REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation",
        description="Score a checkpoint, or a folder of videos and prompts, against real videos.",
        epilog="To compare reports: `python -m evaluation compare --help`. "
        "To measure frames as prompts: `python -m evaluation tasks --help`. "
        "To train the small networks: `python -m evaluation train-tiny --help`. "
        "Every command takes --trust PACKAGE: files may name classes of it too.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        help="sample from it, unless --videos is given; also evaluate its tokenizer",
    )
    add(
        "--videos",
        type=Path,
        help="a folder with prompts.jsonl of mp4, avi, gif and other containers, of folders of "
        "frames (rows say fps), or of tensors in .pt, .npy, .safetensors (rows say fps, layout "
        "'F H W 3', '3 F H W' or 'F 3 H W', and range '0..1' or '-1..1' if not uint8)",
    )
    add(
        "--protocol",
        help="a shipped protocol's name, or a YAML file (default: demo for captions of moving "
        "shapes, else own)",
    )
    add(
        "--reference",
        type=Path,
        help="a folder or manifest of real videos with captions (default: the protocol's, or the "
        "run's validation clips)",
    )
    add(
        "--networks",
        type=Path,
        help="weights of the small networks (default: the protocol's, or those of the run, which "
        "are trained where it has none)",
    )
    add("--output", type=Path, help="folder of the report (default: report/PROTOCOL in the run)")
    add("--overwrite", action="store_true", help="overwrite also a report of another checkpoint")
    add("--device", default="cpu", help="where the model computes: cpu, cuda (default: cpu)")
    _add_tokenizer_options(parser)
    return parser


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "for a checkpoint of a tokenizer's training",
        "It is evaluated on clips, beside bicubic scaling to as many values and H.264 in as many "
        "bytes. Defaults, also those of --reference and --output, come from its run.",
    )
    add = group.add_argument
    add("--sizes", help="comma-separated, e.g. 17x64x64,9x64x64 (default: the run's)")
    add("--fps", type=float, help="frames per second (default: the run's)")
    add("--lpips", type=Path, help="torchvision's weights of VGG-16; without them no LPIPS")
    add(
        "--strip",
        type=Path,
        help="image of clips and reconstructions (default: in the report's folder)",
    )


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation train-tiny",
        description="Train the small networks on the clips and captions of a manifest.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--manifest", type=Path, required=True, help="JSONL of training videos with captions")
    add("--output", type=Path, required=True, help="the file of weights to write")
    add(
        "--val",
        type=Path,
        help="JSONL to measure accuracy on (default: val.jsonl beside the manifest, if any)",
    )
    add(
        "--protocol",
        default="demo",
        help="protocol whose frames, rate and sizes to train at (default: demo)",
    )
    add("--steps", type=int, help="steps of training")
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation compare",
        description="Paired differences between reports on the same prompts, with intervals.",
        allow_abbrev=False,
    )
    parser.add_argument("reports", nargs="+", type=Path, help="folders of reports, the base first")
    return parser


def _tasks_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation tasks",
        description="Make the videos of every task with known frames, and measure from pixels how "
        "often each is right.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="checkpoint of a training with tasks")
    add("--reference", type=Path, required=True, help="JSONL of real videos of moving shapes")
    add("--output", type=Path, required=True, help="folder of report.json and the images")
    add("--tasks", help="comma-separated tasks (default: all)")
    add("--cases", type=int, help="videos of each task (default: 64)")
    add("--steps", type=int, help="steps of the sampler (default: 25)")
    add("--sizes", type=_sizes, help="training sizes, height x width: 32x32,24x40")
    add("--new-size", type=_size, help="size not used in training (default: 24x32)")
    add("--frames", type=_numbers, help="the two training lengths: 17,25")
    add("--new-frames", type=int, help="longer length not used in training (default: 33)")
    add("--strength", type=float, help="share of the steps used by an edit (default: 0.56)")
    add("--edit-guidance", type=float, help="guidance scale of an edit's prompt (default: 6)")
    add("--device", default="cpu", help="where the model computes: cpu, cuda (default: cpu)")
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(map(_size, text.split(",")))


def _numbers(text: str) -> tuple[int, int]:
    first, second = map(int, text.split(","))
    return first, second


def _tasks(arguments: argparse.Namespace) -> None:
    from evaluation.models.frame_tasks.protocol import TaskProtocol
    from evaluation.models.frame_tasks.run import NAMES, TaskRequest, as_table, measure_tasks

    for option in ("checkpoint", "reference"):
        if not getattr(arguments, option).is_file():
            raise ValueError(f"--{option} {getattr(arguments, option)}: no such file")
    keys = ("cases", "sizes", "new_size", "new_frames", "strength", "edit_guidance")
    changes = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    if arguments.steps is not None:
        changes["sampling"] = replace(TaskProtocol().sampling, num_steps=arguments.steps)
    if arguments.frames is not None:
        changes["frames"], changes["long_frames"] = arguments.frames
    report = measure_tasks(
        TaskRequest(
            arguments.checkpoint,
            arguments.reference,
            arguments.output,
            TaskProtocol(**changes),
            tuple(arguments.tasks.split(",")) if arguments.tasks else NAMES,
            arguments.device,
        )
    )
    print(as_table(report))
    print(f"\n{arguments.output}/report.json")


def _compare(arguments: argparse.Namespace) -> None:
    from evaluation.report.compare import as_table, compare

    print(as_table(arguments.reports, compare(arguments.reports)))


def _evaluate(arguments: argparse.Namespace) -> None:
    # Imported here, since torch takes seconds to load: --help and option errors need not wait.
    from evaluation.checks import Request
    from evaluation.evaluate import evaluate
    from evaluation.own_clips import choose_protocol, run_data, run_folder, small_networks
    from evaluation.protocol import load_protocol

    _check_paths(arguments, ("checkpoint", "videos", "reference", "networks"))
    if arguments.checkpoint is not None and arguments.videos is None:
        from evaluation.models.tokenizers.run import holds_only_a_tokenizer

        if holds_only_a_tokenizer(arguments.checkpoint):
            _evaluate_tokenizer(arguments)
            return
    for option in ("sizes", "fps", "lpips", "strip"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} only applies to the checkpoint of a tokenizer's training")
    if arguments.checkpoint is None and arguments.videos is None:
        raise ValueError("neither --checkpoint nor --videos is given: there is nothing to evaluate")
    data = run_data(arguments.checkpoint)
    if arguments.protocol is None:
        protocol, reference = choose_protocol(arguments.reference, data)
    else:
        protocol = load_protocol(arguments.protocol)
        if (given := arguments.reference or protocol.paths.reference) is None:
            raise ValueError(f"protocol {protocol.name}: names no reference; give --reference")
        reference = given
    folder = arguments.videos if arguments.checkpoint is None else run_folder(arguments.checkpoint)
    networks = arguments.networks or protocol.paths.networks
    if networks is None and protocol.networks.videos is None:
        networks = small_networks(folder, data, protocol)
    output = arguments.output or folder / "report" / protocol.name
    report = evaluate(
        Request(
            protocol=protocol,
            reference=reference,
            networks=networks,
            output=output,
            checkpoint=arguments.checkpoint,
            videos=arguments.videos,
            device=arguments.device,
            overwrite=arguments.overwrite,
        )
    )
    from evaluation.report.write import as_text

    print(as_text(report))
    print(f"\n{output}/report.html")


def _check_paths(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    for option in options:
        path = getattr(arguments, option)
        # `make eval` without CKPT gives an empty path, which pathlib reads as the current folder.
        if path == Path():
            raise ValueError(f"--{option} is empty: name a file or folder")
        if path is not None and not path.exists():
            raise ValueError(f"--{option} {path}: no such file or folder")


def _evaluate_tokenizer(arguments: argparse.Namespace) -> None:
    from evaluation.models.tokenizers.run import TokenizerRequest, evaluate_tokenizer
    from evaluation.own_clips import run_data, run_folder
    from evaluation.protocol import load_protocol
    from evaluation.report.write import as_text

    _check_paths(arguments, ("lpips",))
    run = run_data(arguments.checkpoint)
    listed = run.get("sizes") if isinstance(run.get("sizes"), list) else None
    found: dict[str, Any] = {
        "reference": arguments.reference or run.get("val_manifest"),
        "sizes": arguments.sizes.split(",") if arguments.sizes else listed,
        "fps": arguments.fps or run.get("fps"),
    }
    for option, value in found.items():
        if not value:
            raise ValueError(
                f"--{option} is missing, and no config.yaml of a run beside "
                f"{arguments.checkpoint} gives it"
            )
    protocol = load_protocol(arguments.protocol or "demo")
    output = arguments.output or run_folder(arguments.checkpoint) / "report"
    report = evaluate_tokenizer(
        TokenizerRequest(
            checkpoint=arguments.checkpoint,
            reference=Path(found["reference"]),
            sizes=tuple(found["sizes"]),
            fps=float(found["fps"]),
            output=output,
            strip=arguments.strip or output / "strip.png",
            protocol=protocol,
            networks=arguments.networks or protocol.paths.networks,
            lpips=arguments.lpips,
            device=arguments.device,
        )
    )
    print(as_text(report))
    for reason in report["left_out"]:
        print(f"left out: {reason}")
    print(f"\n{output}/report.html")


def _train(arguments: argparse.Namespace) -> None:
    from evaluation.protocol import load_protocol
    from evaluation.train_tiny import TinyTraining, train_tiny

    beside = arguments.manifest.with_name("val.jsonl")
    validation = arguments.val or (beside if beside.is_file() else None)
    training = TinyTraining()
    if arguments.steps is not None:
        training = replace(training, num_steps=arguments.steps)
    clips = load_protocol(arguments.protocol).clips
    notes = train_tiny(arguments.manifest, arguments.output, validation, clips, training)
    for name, value in notes.items():
        print(f"{name:16} {value:.3g}")
    print(arguments.output)


_VERBS = {
    "train-tiny": (_train_parser, _train),
    "compare": (_compare_parser, _compare),
    "tasks": (_tasks_parser, _tasks),
}

if __name__ == "__main__":
    sys.exit(main())
