"""The command ``convert``: public checkpoints to files of this package and back."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from sora_lightning.checks import naming, require_file
from sora_lightning.cli.model_folder import write_model
from sora_lightning.cli.suggest import suggestion
from sora_lightning.files import check_output
from sora_lightning.interop.finetuned import write_diffusers
from sora_lightning.interop.pretrained import Pretrained, read_foreign, write_foreign
from sora_lightning.types import TokenGrid, VideoSize

OURS, DIFFUSERS, MODEL = "sora-lightning", "diffusers", "model"
FAMILIES = (
    "dit",
    "dit-diffusers",
    "sit",
    "latte",
    "latte-diffusers",
    "uvit",
    "vivit",
    "ldm",
    "ldm-diffusers",
)


def convert(
    source: str,
    target: str,
    input: Path,
    output: Path,
    num_heads: int | None = None,
    grid: str | None = None,
    report: Path | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Rename the weights in a file; a weight that has no place on the other side is an error.

    Args:
        source: What the input is: sora-lightning, or a family of public checkpoints.
        target: What the output is to be; diffusers is a folder of the adapters that a run of
            fine-tuning trained, or of the whole pipeline, and model one of a run's whole model,
            with its configuration and a model card.
        input: A .safetensors file, or .pt, .pth, .bin, .ckpt as torch.save writes them; for the
            targets diffusers and model, a checkpoint of that run.
        output: A file for sora-lightning is a .safetensors that says which model it fills.
        num_heads: Attention heads, which weights do not show; needed for widths that the family's
            papers do not have.
        grid: Frames x rows x columns of tokens, for a target with tables of positions where the
            input does not say it, as 1x16x16.
        report: The report.json of an evaluation of the input, for the card of the target model.
        push_to_hub: Repository on the hub that the target model is uploaded to, as owner/name.
    """
    if target == MODEL and source == OURS:
        print(write_model(input, output, report, push_to_hub))
        return
    if report is not None or push_to_hub is not None:
        raise ValueError(f"--report and --push-to-hub are for --target {MODEL} alone")
    if target == DIFFUSERS and source == OURS:
        print(write_diffusers(input, output))
        return
    for flag, name in (("--source", source), ("--target", target)):
        if name not in (OURS, *FAMILIES):
            raise ValueError(f"{flag} {name}: {suggestion(name, (OURS, *FAMILIES))}")
    if source == target:
        raise ValueError(f"--source and --target are both {source}: nothing to convert")
    if target == OURS and output.suffix != ".safetensors":
        raise ValueError(f"--output {output}: a file of {OURS} ends in .safetensors")
    require_file("--input", input)
    check_output(output)
    with naming(f"{input} as {source}:"):
        if source == OURS:
            pretrained = Pretrained.load(input)
        else:
            pretrained = _family(source).to_ours(read_foreign(input), num_heads)
    if grid is not None:
        size = VideoSize.parse(grid)
        pretrained = replace(pretrained, grid=TokenGrid(size.num_frames, size.height, size.width))
    if target == OURS:
        pretrained.save(output)
    else:
        with naming(f"{input} as {target}:"):
            weights = _family(target).to_theirs(pretrained)
        write_foreign(weights, output)
    print(f"{output}: {len(pretrained.weights)} weights of {', '.join(pretrained.parts)}")


def _family(name: str) -> ModuleType:
    """The module of a family, which ``FAMILIES`` names with a dash for an underscore."""
    return import_module(f"sora_lightning.interop.{name.replace('-', '_')}")
