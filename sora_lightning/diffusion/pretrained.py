"""Path, prediction and times of a public model, from the ``scheduler_config.json`` of diffusers.

A folder is that of a scheduler or of a whole pipeline.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sora_lightning.checks import import_optional
from sora_lightning.diffusers_folders import part_of_pipeline
from sora_lightning.diffusion.objectives import SquaredError
from sora_lightning.diffusion.paths import (
    Betas,
    CosineBetas,
    LinearBetas,
    RectifiedFlow,
    ScaledLinearBetas,
    ShiftedBetas,
    VariancePreserving,
)
from sora_lightning.diffusion.predictions import Data, Epsilon, Prediction, Process, V, Velocity
from sora_lightning.diffusion.times import LogitNormal, SizeShift, TrainingTimes, Uniform

_BETAS: dict[str, type[LinearBetas | ScaledLinearBetas]] = {
    "linear": LinearBetas,
    "scaled_linear": ScaledLinearBetas,
}
_PREDICTIONS: dict[str, type[Prediction]] = {
    "epsilon": Epsilon,
    "v_prediction": V,
    "sample": Data,
}


def pretrained_objective(folder: Path) -> SquaredError:
    """Return the squared error on the path, and of the prediction, of a scheduler's folder.

    A scheduler of flow matching has the straight path and the velocity. Others have the alphas of
    their betas, which are compared with the scheduler's own, and predict noise, data or v.

    Raises ``ValueError`` for a folder without a scheduler, and for one of another kind.
    """
    scheduler = _scheduler(Path(folder))
    if _is_flow(scheduler.config):
        return SquaredError(Process(RectifiedFlow(), Velocity()))
    return SquaredError(Process(_path(scheduler, folder), _prediction(scheduler, folder)))


def pretrained_times(folder: Path) -> TrainingTimes:
    """Return training times for a scheduler's folder: logit-normal with its shift for flow
    matching, else all of its discrete steps alike.

    Sampling shares the shift. Raises ``ValueError`` for a folder without a scheduler.
    """
    config = _scheduler(Path(folder)).config
    if not _is_flow(config):
        return Uniform(num_values=config.num_train_timesteps)
    if config.get("use_dynamic_shifting"):
        tokens = config.base_image_seq_len, config.max_image_seq_len
        return LogitNormal(by_size=SizeShift(tokens, (config.base_shift, config.max_shift)))
    return LogitNormal(shift=config.get("flow_shift") or config.get("shift") or 1.0)


def _scheduler(folder: Path) -> Any:
    """Return the scheduler itself, whose configuration has the defaults of its class."""
    folder = part_of_pipeline(folder, "scheduler")
    file = folder / "scheduler_config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder}: there is no scheduler_config.json here; give the folder of a pipeline's "
            "scheduler"
        )
    name = json.loads(file.read_text()).get("_class_name", "")
    kind = getattr(import_optional("diffusers", "a scheduler's folder"), name, None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        raise ValueError(f"{file}: {name!r} is no scheduler of diffusers")
    with torch.device("cpu"):
        return kind.from_pretrained(folder, local_files_only=True)


def _is_flow(config: Any) -> bool:
    named = str(config.get("_class_name", "")).startswith("FlowMatch") or "base_shift" in config
    return named or bool(config.get("use_flow_sigmas"))


def _path(scheduler: Any, folder: Path) -> VariancePreserving:
    """Return the path of a discrete scheduler, whose alphas are equal to the scheduler's own."""
    config, alphas = scheduler.config, getattr(scheduler, "alphas_cumprod", None)
    schedule = config.get("beta_schedule")
    if alphas is None or schedule not in (*_BETAS, "squaredcos_cap_v2"):
        raise ValueError(
            f"{folder}: beta_schedule = {schedule}: must be one of {', '.join(_BETAS)}, "
            "squaredcos_cap_v2"
        )
    betas: Betas = CosineBetas()
    if schedule in _BETAS:
        betas = _BETAS[schedule](config.beta_start, config.beta_end)
    if (shift := config.get("snr_shift_scale") or 1.0) != 1:
        betas = ShiftedBetas(betas, shift)
    zero = bool(config.get("rescale_betas_zero_snr"))
    path = VariancePreserving(betas, config.num_train_timesteps, zero)
    ours = path.alphas[1:].square()
    if not torch.allclose(ours, alphas.double(), rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{folder}: the alphas of {config['_class_name']} are not those of its {schedule} betas"
        )
    return path


def _prediction(scheduler: Any, folder: Path) -> Prediction:
    name = scheduler.config.get("prediction_type")
    if name not in _PREDICTIONS:
        raise ValueError(
            f"{folder}: prediction_type = {name}: must be one of {', '.join(_PREDICTIONS)}"
        )
    return _PREDICTIONS[name]()
