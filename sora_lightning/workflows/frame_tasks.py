"""Frames as prompts on the demo's shapes, from the demo's checkpoint to measured rates: a list of
commands, each printed before it runs.

The demo's model is trained a little further with masks of known frames, at its own lengths and at
one second more, on clips of which a third turn to another side: a loop has to turn, and two videos
meet at any angle. The demo's decoder is taught to flicker less where latent frames meet; the
latents stay. Then every task is made and read from pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sora_lightning.checks import require_at_least, require_seed
from sora_lightning.types import VideoSize
from sora_lightning.workflows.stages import (
    EVALUATION,
    LIBRARY,
    Stage,
    encode,
    fit,
    last_checkpoint,
    run_stages,
    seeded,
    synthesize,
)

_DECODER = Path("experiments/tokenizer/decoder.yaml")
_KNOWN_FRAMES = Path("experiments/ablations/frame_tasks.yaml")


def frame_tasks(
    demo: Path = Path("runs/demo"),
    output: Path = Path("runs/frame_tasks"),
    steps: int = 2600,
    cases: int = 64,
    quick: bool = False,
    seed: int = 0,
) -> None:
    """Train the demo's model on known frames, make each task's videos, and measure them.

    A second call resumes after the last stage whose result is up to date.

    Args:
        demo: The output of `sora-lightning demo`: clips, tokenizer, text-to-video model.
        output: The folder of all outputs.
        steps: Steps of training from the demo's weights.
        cases: Videos of each task that are made and evaluated.
        quick: A few steps and cases, to check that every part works; the rates mean nothing.
        seed: Seed of both trainings; the clips and the evaluated cases are equal for all seeds.
    """
    require_at_least(1, steps=steps, cases=cases)
    require_seed(seed)
    config = demo / "text_to_video" / "config.yaml"
    for needed in (config, last_checkpoint(demo / "text_to_video")):
        if not needed.is_file():
            raise ValueError(f"--demo {demo}: lacks {needed}: run `sora-lightning demo` first")
    steps, cases = (4, 4) if quick else (steps, cases)
    run_stages(frame_task_stages(demo, output, steps, cases, quick, seed), output)
    print(f"\nThe rates   {output}/report/report.json\nThe videos  {output}/report/*.png")


def frame_task_stages(
    demo: Path, output: Path, steps: int, cases: int, quick: bool = False, seed: int = 0
) -> list[Stage]:
    """Return the stages in order: clips, decoder, latents of both lengths, training, videos and
    rates.
    """
    data = yaml.safe_load((demo / "text_to_video" / "config.yaml").read_text())["data"]
    short = [VideoSize.parse(size) for size in data["batching"]["sizes"]]
    long = [_longer(size, data) for size in short]
    run = output / "model"
    return [
        _synthesize(output, quick),
        _fit_decoder(demo, output, short, quick, seed),
        _encode(output, [*short, *long]),
        _train(demo, output, [*short, *long], run, steps, seed),
        _measure(demo, output, (short, long), run, cases, quick),
    ]


def _longer(size: VideoSize, data: dict[str, Any]) -> VideoSize:
    """A second more."""
    return VideoSize(size.num_frames + round(data["fps"]), size.height, size.width)


def _synthesize(output: Path, quick: bool) -> Stage:
    counts = ("--num-train", "48" if quick else "2560", "--num-val", "0", "--num-test", "0")
    return synthesize(output, "--turns", "0.35", *counts)


def _fit_decoder(demo: Path, output: Path, sizes: list[VideoSize], quick: bool, seed: int) -> Stage:
    few = ("--trainer.max_steps", "4") if quick else ()
    return _fit_further(
        *("decoder", demo / "tokenizer", _DECODER, output / "decoder"),
        *(
            "--model.init_args.tokenizer.init_args.checkpoint",
            last_checkpoint(demo / "tokenizer"),
        ),
        *(
            "--data.manifest",
            output / "data" / "train.jsonl",
            "--data.batching.sizes",
            _listed(sizes),
            *few,
            *seeded(seed),
        ),
    )


def _encode(output: Path, sizes: list[VideoSize]) -> Stage:
    clips = (
        "--data.manifest",
        f"{output}/data/train.jsonl",
        "--data.batching.predict_sizes",
        _listed(sizes),
    )
    config = output / "decoder" / "config.yaml"
    return encode(output, config, *clips, "--latents.root", f"{output}/latents")


def _train(
    demo: Path, output: Path, sizes: list[VideoSize], run: Path, steps: int, seed: int
) -> Stage:
    base, tokenizer = demo / "text_to_video", last_checkpoint(output / "decoder")
    return _fit_further(
        *("model", base, _KNOWN_FRAMES, run),
        *("--checkpoint.start_from", last_checkpoint(base)),
        *("--model.init_args.tokenizer.init_args.checkpoint", tokenizer),
        *(
            "--data.manifest",
            output / "data" / "train.jsonl",
            "--data.batching.sizes",
            _listed(sizes),
        ),
        *("--data.latents", output / "latents", "--data.captions.synthetic", "null"),
        *("--trainer.max_steps", steps, "--trainer.val_check_interval", steps),
        *seeded(seed),
    )


def _fit_further(name: str, base: Path, delta: Path, run: Path, *settings: object) -> Stage:
    """Return a training in ``run``, configured like a run of the demo with one more YAML."""
    configs, place = [base / "config.yaml", delta], ("--run_dir", f"{run}", "--ckpt_path", "null")
    return fit(name, run, configs, *map(str, settings), *place)


def _measure(
    demo: Path,
    output: Path,
    lengths: tuple[list[VideoSize], list[VideoSize]],
    run: Path,
    cases: int,
    quick: bool,
) -> Stage:
    report, (short, long) = output / "report", lengths
    command = (
        *("python", "-m", "evaluation", "tasks", "--output", f"{report}"),
        *("--checkpoint", f"{last_checkpoint(run)}"),
        *("--reference", f"{demo}/data/test.jsonl", "--cases", f"{cases}"),
        *("--sizes", ",".join(f"{size.height}x{size.width}" for size in short)),
        *("--frames", f"{short[0].num_frames},{long[0].num_frames}"),
        *(("--steps", "2") if quick else ()),
    )
    return Stage("report", command, (report,), (report,), reads=(EVALUATION, LIBRARY))


def _listed(sizes: list[VideoSize]) -> str:
    return f"[{','.join(map(str, sizes))}]"
