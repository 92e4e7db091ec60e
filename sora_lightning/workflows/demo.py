"""The whole pipeline as a list of commands, each printed before it runs.

They render clips of which a third keeps its captions, train a tokenizer, a captioner that captions
the others, a text-to-video transformer and a model that expands short prompts, and sample and score
videos of prompts that the training never saw.
"""

from __future__ import annotations

from pathlib import Path

from sora_lightning.checks import require_seed
from sora_lightning.cli.expansion import BESIDE as EXPANSION
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

_HOME = Path("runs/demo")
_CONFIGS = Path("experiments/demo")
_CAPTIONER = _CONFIGS / "captioner.yaml"


def demo(output: Path = _HOME, quick: bool = False, seed: int = 0) -> None:
    """Render clips, train a tokenizer, a captioner and a text-to-video model, sample unseen
    prompts, score the videos.

    A second call resumes after the last stage whose result is up to date.

    Args:
        output: The folder of all outputs.
        quick: A few steps in each stage, to check that every part works; the videos show
            nothing.
        seed: Seed of the three trainings. The clips, and the noise that videos are sampled from,
            are equal for all seeds.
    """
    require_seed(seed)
    run_stages(demo_stages(output, quick, seed), output)
    print(
        f"\nThe scores      {output}/report/report.html"
        f"\nThe videos      {output}/samples/contact_sheet.gif"
        f"\nThe curves      {output}/losses.png, or all of them, and videos that move:"
        f"\n                tensorboard --logdir {output} --samples_per_plugin images=100"
        f"\nYour own words  sora-lightning sample "
        f"--checkpoint {last_checkpoint(output / 'text_to_video')} "
        f'--prompt "a red circle moves left" --output {output}/mine.mp4'
    )


def demo_stages(output: Path, quick: bool = False, seed: int = 0) -> list[Stage]:
    """Return the stages in order. Commands leave out paths that the YAMLs already set."""
    clips = _synthesize(output, quick)
    training = [
        _fit_tokenizer(output, quick, seed),
        _encode(output),
        _hide_captions(output),
        _fit_captioner(output, quick, seed),
        _caption(output),
        _fit_text_to_video(output, quick, seed),
        _pair_captions(output),
        _train_expansion(output, quick, seed),
    ]
    evaluated = [_train_networks(output, quick), _sample(output, quick), _score(output)]
    return [clips, *training, *evaluated, _draw_curves(output)]


def _synthesize(output: Path, quick: bool) -> Stage:
    few = ("--num-train", "48", "--num-val", "16", "--num-test", "24") if quick else ()
    return synthesize(output, *few)


def _fit_tokenizer(output: Path, quick: bool, seed: int) -> Stage:
    places = _elsewhere(output, {"run_dir": "tokenizer", **_CLIPS})
    config, run = _CONFIGS / "tokenizer.yaml", output / "tokenizer"
    return fit("tokenizer", run, [config], *_few_steps(quick), *seeded(seed), *places)


def _encode(output: Path) -> Stage:
    places = _elsewhere(output, {"run_dir": "tokenizer", **_CLIPS, "latents.root": "latents"})
    return encode(output, _CONFIGS / "tokenizer.yaml", *places)


def _hide_captions(output: Path) -> Stage:
    third = output / "captions" / "third.jsonl"
    clips = ("--manifest", f"{output}/data/train.jsonl", "--output", f"{third}")
    command = ("sora-lightning", "hide-captions", *clips, "--kept", "0.3334")
    return Stage("third", command, (third,), (third,), reads=(LIBRARY / "data",))


def _fit_captioner(output: Path, quick: bool, seed: int) -> Stage:
    places = _elsewhere(output, {"run_dir": "captioner", **_CAPTIONED_CLIPS})
    run = output / "captioner"
    return fit("captioner", run, [_CAPTIONER], *_few_steps(quick), *seeded(seed), *places)


def _caption(output: Path) -> Stage:
    captioned = output / "captions" / "captioned.jsonl"
    places = _elsewhere(output, {"run_dir": "captioner", **_CAPTIONED_CLIPS})
    command = (
        *("sora-lightning", "predict", "--config", f"{_CAPTIONER}", "--ckpt_path", "last"),
        *("--captions.output", f"{captioned}", *places),
    )
    reads = (_CAPTIONER, LIBRARY)
    return Stage("captions", command, (captioned,), (captioned,), reads, resumes=True)


def _fit_text_to_video(output: Path, quick: bool, seed: int) -> Stage:
    places = {
        "run_dir": "text_to_video",
        **_CLIPS,
        "data.manifest": "captions/captioned.jsonl",
        "data.reading.root": "",
        "data.latents": "latents",
        "model.init_args.tokenizer.init_args.checkpoint": "tokenizer/checkpoints/last.ckpt",
    }
    names = ("text_to_video.yaml", "captions.yaml", "self_conditioning.yaml")
    configs = [_CONFIGS / name for name in names]
    settings = (*_few_steps(quick), *seeded(seed), *_elsewhere(output, places))
    return fit("text_to_video", output / "text_to_video", configs, *settings)


def _pair_captions(output: Path) -> Stage:
    """Write short captions and descriptions of the third of the clips that people captioned."""
    pairs = output / "captions" / "pairs.jsonl"
    clips = ("--manifest", f"{output}/data/train.jsonl", "--output", f"{pairs}")
    command = ("sora-lightning", "simulate-captions", *clips, "--by-people", "0.3334")
    return Stage("pairs", command, (pairs,), (pairs,), reads=(LIBRARY / "data",))


def _train_expansion(output: Path, quick: bool, seed: int) -> Stage:
    """Train the model that expands what users type; it lies beside the checkpoint."""
    model = last_checkpoint(output / "text_to_video").with_name(EXPANSION)
    pairs = ("--manifest", f"{output}/captions/pairs.jsonl", "--output", f"{model}")
    drawn = ("--seed", f"{seed}") if seed else ()
    command = (
        *("sora-lightning", "train-expansion", *pairs),
        *("--steps", "4" if quick else "150", *drawn),
    )
    return Stage("expansion", command, (model,), (model,), reads=(LIBRARY,))


def _train_networks(output: Path, quick: bool) -> Stage:
    networks, data = output / "networks.pt", output / "data"
    few = ("--steps", "40") if quick else ()
    command = ("python", "-m", "evaluation", "train-tiny", "--manifest", f"{data}/train.jsonl")
    return Stage(
        "networks",
        (*command, "--output", f"{networks}", *few),
        makes=(networks,),
        records=(networks,),
        reads=(EVALUATION, LIBRARY),
    )


def _sample(output: Path, quick: bool) -> Stage:
    samples = output / "samples"
    num_steps, model = "4" if quick else "25", last_checkpoint(output / "text_to_video")
    command = (
        *("sora-lightning", "sample", "--checkpoint", f"{model}"),
        *("--prompts", f"{output}/data/test.jsonl", "--no-expand"),
        *("--size", "32x32,24x40,40x24", "--num-frames", "17"),
        *("--num-steps", num_steps, "--output", f"{samples}"),
    )
    return Stage("samples", command, (samples,), (samples,), reads=(LIBRARY,), resumes=True)


def _score(output: Path) -> Stage:
    report = output / "report"
    command = (
        *("python", "-m", "evaluation", "--protocol", "demo", "--videos", f"{output}/samples"),
        *("--checkpoint", f"{last_checkpoint(output / 'text_to_video')}"),
        *("--reference", f"{output}/data/test.jsonl", "--networks", f"{output}/networks.pt"),
        *("--output", f"{report}"),
    )
    written = (report / "report.json", report / "report.html")
    return Stage("report", command, (report,), written, reads=(EVALUATION, LIBRARY))


def _draw_curves(output: Path) -> Stage:
    plot = output / "losses.png"
    command = ("sora-lightning", "curves", "--folder", f"{output}", "--output", f"{plot}")
    return Stage("curves", command, (plot,), (plot,), reads=(LIBRARY / "cli",))


_CLIPS = {"data.manifest": "data/train.jsonl", "data.val_manifest": "data/val.jsonl"}
_CAPTIONED_CLIPS = {
    "data.manifest": "captions/third.jsonl",
    "data.reading.root": "",
    "data.val_manifest": "data/test.jsonl",
}


def _elsewhere(output: Path, places: dict[str, str]) -> tuple[str, ...]:
    """Return arguments that move a command's paths to ``output``, if the YAMLs name another
    folder."""
    if output == _HOME:
        return ()
    return tuple(
        part for key, place in places.items() for part in (f"--{key}", f"{output}/{place}")
    )


def _few_steps(quick: bool) -> tuple[str, ...]:
    return ("--trainer.max_steps", "20") if quick else ()
