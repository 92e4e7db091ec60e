"""Plan of an ablation: every arm, built on the meta device, with its parameters and FLOPs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sora_lightning.ablations.cost import Cost, cost_of
from sora_lightning.ablations.matching import differs, matched_size, resized_values
from sora_lightning.ablations.spec import SEED_KEYS, Ablation, argument
from sora_lightning.checks import naming
from sora_lightning.cli.training_cost import Training, build_training


@dataclass(frozen=True)
class PlannedArm:
    """An arm's configurations and arguments of ``fit``, its steps and its cost."""

    name: str
    configs: tuple[Path, ...]
    arguments: tuple[str, ...]
    max_steps: int
    cost: Cost

    @property
    def training_flops(self) -> float:
        """FLOPs of all steps; infinity for a training that seconds end."""
        return self.cost.flops * self.max_steps if self.max_steps > 0 else float("inf")

    def fit_arguments(self, seed: int) -> tuple[str, ...]:
        """Return the arguments of ``fit`` after its YAMLs, without ``run_dir``."""
        return (*self.arguments, *(f"--{key}={seed}" for key in SEED_KEYS))


def make_plan(ablation: Ablation) -> list[PlannedArm]:
    """Build and count every arm, the reference first, and solve what is to be equal.

    Raises ``ValueError`` naming the arm for what ``fit`` would refuse, and for an arm that cannot
    be matched.
    """
    reference = _planned(ablation, ablation.reference_arm, None)
    return [reference, *(_planned(ablation, name, reference) for name in ablation.other_arms)]


def _planned(ablation: Ablation, name: str, reference: PlannedArm | None) -> PlannedArm:
    configs = tuple(ablation.configs(name))
    arguments = ablation.arguments(name)
    with naming(f"arms.{name}:"):
        training = _build(ablation, configs, arguments)
        if ablation.clip_overrides:  # what measuring the clips would refuse after the training
            clips = [argument(*item) for item in ablation.clip_overrides.items()]
            _build(ablation, configs, [*arguments, *clips])
        cost = cost_of(training)
        steps = training.max_steps
        if ablation.equal == "seconds":
            arguments += [
                "--trainer.max_steps=-1",
                f"--trainer.max_time={_clock(ablation.seconds)}",
            ]
            steps = -1
        elif steps < 1:
            raise ValueError(f"trainer.max_steps = {steps}: set it, or equal: seconds")
        elif reference is not None and ablation.equal == "training_flops":
            steps = max(1, round(reference.training_flops / cost.flops))
            arguments.append(f"--trainer.max_steps={steps}")
        elif reference is not None and ablation.equal in ("parameters", "flops"):
            target = float(getattr(reference.cost, ablation.equal))
            if differs(getattr(cost, ablation.equal), target):
                keys = ablation.width_keys
                size = matched_size(training, target, ablation.equal, keys)
                arguments += [argument(*item) for item in resized_values(size, keys).items()]
                cost = cost_of(_build(ablation, configs, arguments))
    return PlannedArm(name, configs, tuple(arguments), steps, cost)


def _build(ablation: Ablation, configs: Sequence[Path], arguments: Sequence[str]) -> Training:
    given = [part for config in configs for part in ("--config", str(config))]
    seeding = [f"--{key}={ablation.seeds[0]}" for key in SEED_KEYS]
    return build_training([*given, *arguments, *seeding, f"--run_dir={ablation.output / 'plan'}"])


def _clock(seconds: float | None) -> str:
    """Return seconds as ``days:hours:minutes:seconds``, as Lightning takes them."""
    assert seconds is not None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 1440:02d}:{minutes // 60 % 24:02d}:{minutes % 60:02d}:{rest:02d}"


def plan_text(ablation: Ablation, arms: Sequence[PlannedArm]) -> str:
    """Format a plan for a terminal: a line for each arm."""
    head = ("arm", "parameters", "FLOPs a step", "steps", "tokens a step", "AD", "attended")
    rows = [head, *map(_row, arms)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    num_runs = len(arms) * len(ablation.seeds)
    total = sum(arm.training_flops for arm in arms) * len(ablation.seeds)
    lines = [line.rstrip() for line in lines]
    lines.append(f"{num_runs} runs, {total:.3g} FLOPs; equal: {ablation.equal}")
    return "\n".join(lines)


def _row(arm: PlannedArm) -> tuple[str, ...]:
    cost = arm.cost
    distance = "" if cost.attention_distance is None else f"{cost.attention_distance:.3f}"
    share = "" if cost.attended_share is None else f"{100 * cost.attended_share:.1f} %"
    steps = str(arm.max_steps) if arm.max_steps > 0 else "by time"
    counts = (f"{cost.parameters:,}", f"{cost.flops:.4g}", steps, f"{cost.tokens:,}")
    return (arm.name, *counts, distance, share)


def write_plan(arms: Sequence[PlannedArm], path: Path) -> None:
    """Write a plan as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(arm) for arm in arms]
    path.write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")


def read_plan(path: Path) -> list[PlannedArm]:
    """Read what ``write_plan`` wrote. Raises ``ValueError`` if nothing has been run yet."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file: nothing has been run yet")
    return [
        PlannedArm(
            name=row["name"],
            configs=tuple(map(Path, row["configs"])),
            arguments=tuple(row["arguments"]),
            max_steps=row["max_steps"],
            cost=Cost(**row["cost"]),
        )
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
