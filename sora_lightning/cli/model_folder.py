"""A trained model as a folder: weights, configuration and model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sora_lightning.checkpoints import (
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    averaged_state_dict,
    read_checkpoint,
)
from sora_lightning.checks import import_optional
from sora_lightning.cli.inspecting import describe
from sora_lightning.files import check_new_folder, file_sha256, new_folder, save_tensors

_KEPT = ("hyper_parameters", "training_sizes", "global_step", "provenance")


def write_model(
    checkpoint: Path, output: Path, report: Path | None = None, push_to_hub: str | None = None
) -> str:
    """Write a run's model, with averaged weights, and return one line about the result.

    The folder takes the checkpoint's place wherever a model is read, as in
    ``DiffusionSystem.from_checkpoint``. Its README.md is a model card: the training's data, commit
    and versions, and the scores of an evaluation's ``report`` with their intervals.
    ``push_to_hub`` is a repository's name on the hub of models, which is made if it is missing.

    Raises ``ValueError`` for a file that is no checkpoint, for the report of another one, and where
    the output exists.
    """
    check_new_folder(output)
    content = read_checkpoint(checkpoint)
    facts = describe(content, checkpoint)
    scores = None if report is None else _scores(report, checkpoint)
    weights = averaged_state_dict(content)
    tensors = {name: one.contiguous().clone() for name, one in _split(weights, True).items()}
    config = {name: content[name] for name in _KEPT if name in content}
    config["states"] = _split(weights, False)
    with new_folder(output) as folder:
        save_tensors(tensors, folder / MODEL_WEIGHTS)
        (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (folder / "README.md").write_text(_card(output.name, facts, scores))
    written = f"{output}: {len(tensors)} tensors of {facts['system']}, step {facts['step']}"
    if push_to_hub is None:
        return written
    hub = import_optional("huggingface_hub", "--push-to-hub").HfApi()
    hub.create_repo(push_to_hub, exist_ok=True)
    hub.upload_folder(repo_id=push_to_hub, folder_path=output)
    return f"{written}; pushed to {push_to_hub}"


def _split(weights: dict[str, Any], tensors: bool) -> dict[str, Any]:
    """Return the tensors of a state dict, or what is none, such as a vocabulary."""
    return {name: one for name, one in weights.items() if isinstance(one, Tensor) == tensors}


def _scores(report: Path, checkpoint: Path) -> dict[str, Any]:
    """Return a report of ``evaluation``. Raises ``ValueError`` for that of another checkpoint."""
    try:
        found = json.loads(report.read_text())
        details, model = found["details"], found["checkpoint"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--report {report}: is no report.json of an evaluation") from error
    assert isinstance(details, dict)
    if model is not None and model["sha256"] != file_sha256(checkpoint):
        raise ValueError(f"--report {report}: is of {model['path']}, not of {checkpoint}")
    return found


def _card(name: str, facts: dict[str, Any], report: dict[str, Any] | None) -> str:
    system = str(facts["system"]).rpartition(".")[2]
    data = facts["data"] or {}
    rows = {
        "Steps": facts["step"],
        "Sizes (frames x height x width)": ", ".join(facts["training_sizes"] or ()) or None,
        "Fingerprint of the training's clips and their order": data.get("fingerprint"),
        "Seed": facts["seed"],
        "Commit": facts["commit"],
        **{f"Version of {package}": one for package, one in (facts["versions"] or {}).items()},
    }
    lines = [
        *("---", "library_name: sora-lightning", "tags: [text-to-video]", "---", ""),
        *(f"# {name}", ""),
        f"Values of each part: {', '.join(f'{k} {v:,}' for k, v in facts['values'].items())}.",
        *("", "```python", f"from sora_lightning.systems import {system}", ""),
        *(f'model = {system}.from_checkpoint("{name}")', "```", "", "## Training", ""),
        *("| | |", "|---|---|"),
        *(f"| {key} | {'not recorded' if one is None else one} |" for key, one in rows.items()),
    ]
    if report is not None:
        lines += ["", "## Scores", "", f"Protocol {report['protocol']}, fingerprint"]
        lines[-1] += f" `{report['fingerprint']}`; intervals as the report gives them."
        lines += ["", "| Score | Value | From | To | n |", "|---|---|---|---|---|"]
        lines += [_score_row(key, one) for key, one in report["details"].items()]
    return "\n".join(lines) + "\n"


def _score_row(name: str, score: dict[str, Any]) -> str:
    ends = ("" if score[end] is None else f"{score[end]:.4g}" for end in ("low", "high"))
    return f"| {name} | {score['value']:.4g} | {' | '.join(ends)} | {score['n']} |"
