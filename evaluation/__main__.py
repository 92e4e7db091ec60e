"""Command line of the evaluation.

``python -m evaluation`` scores, ``compare`` compares reports, ``seeds`` gives their mean and range,
``tasks`` measures generation from known frames, and ``train-tiny`` trains the small networks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.models.frame_tasks.protocol import TaskProtocol
from sora_lightning.checks import require_at_least
from sora_lightning.cli.errors import FAILED, INTERRUPTED, REFUSED
from sora_lightning.cli.functions import run_function
from sora_lightning.trust import pop_trusted


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 for files that cannot be used, 2 for a user's
    error, 130 if interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments and arguments[0] in _VERBS else ""
    if verb in ("compare", "seeds"):
        folders = [argument for argument in arguments if not argument.startswith("-")]
        options = [argument for argument in arguments if argument.startswith("-")]
        arguments = ["--reports", json.dumps(folders), *options]
    try:
        program = f"python -m evaluation {verb}".rstrip()
        run_function(program, _VERBS.get(verb, score), pop_trusted(arguments))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes sampling", file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return FAILED
    return 0


@dataclass(frozen=True)
class PromptOptions:
    """What a checkpoint is prompted with.

    Args:
        prompt_column: The reference's column of prompts (default: caption, text or prompt).
        expand: A checkpoint of ``sora-lightning train-expansion``, or the folder of a causal
            language model of transformers, that expands the prompts (default: they stay as they
            are).
    """

    prompt_column: str | None = None
    expand: Path | None = None


@dataclass(frozen=True)
class TokenizerOptions:
    """Options that only the checkpoint of a tokenizer's training takes.

    Args:
        sizes: Sizes of the clips, e.g. ``17x64x64,9x64x64`` (default: the run's).
        fps: Frames per second (default: the run's).
        lpips: torchvision's weights of VGG-16; without them there is no LPIPS.
        strip: Image of clips and reconstructions (default: in the report's folder).
    """

    sizes: tuple[str, ...] = ()
    fps: float | None = None
    lpips: Path | None = None
    strip: Path | None = None


def score(
    checkpoint: Path | None = None,
    videos: Path | None = None,
    protocol: str | None = None,
    reference: Path | None = None,
    networks: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    root: str | None = None,
    prompting: PromptOptions = PromptOptions(),
    tokenizer: TokenizerOptions = TokenizerOptions(),
) -> None:
    """Score a checkpoint, or a folder of videos and prompts, against real videos.

    The checkpoint of a tokenizer's training is evaluated on clips, beside bicubic scaling to as
    many values and H.264 in as many bytes. Other commands, each with its own ``--help``: compare,
    seeds, tasks, train-tiny. Every command takes ``--trust PACKAGE``: files may name classes of
    it too.

    Args:
        checkpoint: Sample from it, unless ``--videos`` is given; also evaluate its tokenizer.
        videos: Folder with ``prompts.jsonl`` of mp4, avi, gif and other containers, of folders of
            frames (rows say fps), or of tensors in .pt, .npy, .safetensors (rows say fps, layout
            'F H W 3', '3 F H W' or 'F 3 H W', and range '0..1' or '-1..1' if not uint8).
        protocol: A shipped protocol's name, or a YAML file (default: demo for captions of moving
            shapes, else own).
        reference: Folder or manifest of real videos with captions (default: the protocol's, or the
            run's validation clips).
        networks: Weights of the small networks (default: the protocol's, or those of the run,
            which are trained where it has none).
        output: Folder of the report (default: report/PROTOCOL in the run).
        overwrite: Overwrite also a report of another checkpoint.
        device: Where the model computes: cpu, cuda.
        root: A folder, besides that of each manifest, in which the files may lie that it names
            (default: the run's ``data.reading.root``).
        prompting: For a checkpoint that videos are sampled from.
        tokenizer: For the checkpoint of a tokenizer's training.
    """
    # Imported here, since torch takes seconds to load: --help and option errors need not wait.
    from evaluation.checks import Request
    from evaluation.evaluate import evaluate
    from evaluation.own_clips import choose_protocol, run_data, run_folder, small_networks
    from evaluation.report.write import as_text

    paths = {"checkpoint": checkpoint, "videos": videos, "reference": reference}
    _check_paths(**paths, networks=networks, lpips=tokenizer.lpips, expand=prompting.expand)
    if checkpoint is not None and videos is None:
        from evaluation.models.tokenizers.run import holds_only_a_tokenizer

        if holds_only_a_tokenizer(checkpoint):
            given = checkpoint, protocol or "demo", reference, networks, output, device, root
            _check_unset("a checkpoint that videos are sampled from", prompting)
            return _score_tokenizer(*given, tokenizer)
    _check_unset("the checkpoint of a tokenizer's training", tokenizer)
    if videos is not None:
        _check_unset("a checkpoint that videos are sampled from", prompting)
    if checkpoint is None and videos is None:
        raise ValueError("neither --checkpoint nor --videos is given: there is nothing to evaluate")
    data = run_data(checkpoint)
    data["root"] = root = root or data.get("root")
    chosen, reference = choose_protocol(protocol, reference, data)
    folder = run_folder(checkpoint) if checkpoint is not None else videos
    assert folder is not None
    networks = networks or chosen.paths.networks
    if networks is None and chosen.networks.videos is None:
        networks = small_networks(folder, data, chosen)
    output = output or folder / "report" / chosen.name
    report = evaluate(
        Request(
            protocol=chosen,
            reference=reference,
            output=output,
            networks=networks,
            checkpoint=checkpoint,
            videos=videos,
            device=device,
            overwrite=overwrite,
            root=root,
            prompt_column=prompting.prompt_column,
            expand=prompting.expand,
        )
    )
    print(f"{as_text(report)}\n\n{output}/report.html")
    return None


def _score_tokenizer(
    checkpoint: Path,
    protocol: str,
    reference: Path | None,
    networks: Path | None,
    output: Path | None,
    device: str,
    root: str | None,
    options: TokenizerOptions,
) -> None:
    from evaluation.models.tokenizers.run import TokenizerRequest, evaluate_tokenizer
    from evaluation.own_clips import run_data, run_folder
    from evaluation.protocol import load_protocol
    from evaluation.report.write import as_text

    run = run_data(checkpoint)
    listed = run.get("sizes") if isinstance(run.get("sizes"), list) else None
    found: dict[str, Any] = {
        "reference": reference or run.get("val_manifest"),
        "sizes": options.sizes or listed,
        "fps": options.fps or run.get("fps"),
    }
    for option, value in found.items():
        if not value:
            raise ValueError(
                f"--{option} is missing, and no config.yaml of a run beside {checkpoint} gives it"
            )
    chosen = load_protocol(protocol)
    output = output or run_folder(checkpoint) / "report"
    report = evaluate_tokenizer(
        TokenizerRequest(
            checkpoint=checkpoint,
            reference=Path(found["reference"]),
            sizes=tuple(found["sizes"]),
            fps=float(found["fps"]),
            output=output,
            strip=options.strip or output / "strip.png",
            protocol=chosen,
            networks=networks or chosen.paths.networks,
            lpips=options.lpips,
            device=device,
            root=root or run.get("root"),
        )
    )
    left_out = [f"left out: {reason}" for reason in report["left_out"]]
    print("\n".join([as_text(report), *left_out, f"\n{output}/report.html"]))


def _check_unset(owner: str, options: PromptOptions | TokenizerOptions) -> None:
    for option, value in vars(options).items():
        if value:
            raise ValueError(f"--{option.replace('_', '-')} only applies to {owner}")


def _check_paths(**paths: Path | None) -> None:
    for option, path in paths.items():
        # `make eval` without CKPT gives an empty path, which pathlib reads as the current folder.
        if path == Path():
            raise ValueError(f"--{option} is empty: name a file or folder")
        if path is not None and not path.exists():
            raise ValueError(f"--{option} {path}: no such file or folder")


def compare(reports: list[Path]) -> None:
    """Print the paired differences between reports on the same prompts, with intervals.

    Args:
        reports: Folders of reports, the base first: ``compare BASE OTHER ...``.
    """
    from evaluation.report.compare import as_table, compare

    print(as_table(reports, compare(reports)))


def seeds(reports: list[Path]) -> None:
    """Print the mean and range of each score over trainings that differ in their seed.

    Args:
        reports: Folders of reports, of scores or of frame tasks: ``seeds REPORT REPORT ...``.
    """
    from evaluation.report.seeds import as_table, over_seeds

    print(as_table(over_seeds(reports)))


def tasks(
    checkpoint: Path,
    reference: Path,
    output: Path,
    tasks: tuple[str, ...] = (),
    protocol: TaskProtocol = TaskProtocol(),
    device: str = "cpu",
    root: str | None = None,
) -> None:
    """Make videos of every task with known frames, and measure how often each is right.

    Args:
        checkpoint: Checkpoint of a training with tasks.
        reference: JSONL of real videos of moving shapes.
        output: Folder of report.json and the images.
        tasks: Names of the tasks, ``extend,loop`` (default: all).
        protocol: Settings of the measurement.
        device: Where the model computes: cpu, cuda.
        root: A folder, besides the reference's own, in which its videos may lie.
    """
    from evaluation.models.frame_tasks.run import TaskRequest, as_table, measure_tasks

    _check_paths(checkpoint=checkpoint, reference=reference)
    request = TaskRequest(checkpoint, reference, output, protocol, tasks, device, root)
    print(f"{as_table(measure_tasks(request))}\n\n{output}/report.json")


def train_tiny(
    manifest: Path,
    output: Path,
    val: Path | None = None,
    protocol: str = "demo",
    steps: int | None = None,
    root: str | None = None,
) -> None:
    """Train the small networks on the clips and captions of a manifest.

    Args:
        manifest: JSONL of training videos with captions.
        output: The file of weights to write.
        val: JSONL to measure accuracy on (default: val.jsonl beside the manifest, if any).
        protocol: Protocol whose frames, rate and sizes to train at.
        steps: Steps of training.
        root: A folder, besides those of the manifests, in which their videos may lie.
    """
    from evaluation.protocol import load_protocol
    from evaluation.train_tiny import TinyTraining, train_tiny

    require_at_least(1, steps=steps)
    beside = manifest.with_name("val.jsonl")
    validation = val or (beside if beside.is_file() else None)
    training = TinyTraining()
    if steps is not None:
        training = replace(training, num_steps=steps)
    notes = train_tiny(manifest, output, validation, load_protocol(protocol).clips, training, root)
    for name, value in notes.items():
        print(f"{name:16} {value:.3g}")
    print(output)


_VERBS: dict[str, Callable[..., None]] = {
    "train-tiny": train_tiny,
    "compare": compare,
    "seeds": seeds,
    "tasks": tasks,
}

if __name__ == "__main__":
    sys.exit(main())
