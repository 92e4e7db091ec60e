"""The YAML of an ablation as frozen dataclasses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sora_lightning.checks import naming, require_at_least
from sora_lightning.cli.explain import build
from sora_lightning.cli.sources import read_yaml
from sora_lightning.cli.suggest import suggestion
from sora_lightning.files import find_config

SIZE_KEY = "model.init_args.denoiser.init_args.size"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
SEED_KEYS = ("seed_everything", "model.init_args.seed", "data.batching.seed")


@dataclass(frozen=True)
class Arm:
    """Differences of an arm from the base.

    Args:
        configs: YAMLs given after the base, as with ``fit --config``.
        overrides: Values by dotted key, given after the YAMLs.
    """

    configs: list[Path] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """How runs are started.

    Args:
        at_once: Number of runs that train at the same time.
        slurm: Parameters of submitit's SLURM executor, such as ``slurm_partition`` and
            ``timeout_min``; runs are then the tasks of one job array. ``None`` runs them on this
            machine.
    """

    at_once: int = 1
    slurm: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        require_at_least(1, where="schedule.", at_once=self.at_once)


@dataclass(frozen=True)
class Ablation:
    """Trainings of the same base that differ by arm and seed, and how they are compared.

    Args:
        base: YAML of a training.
        arms: Arms by name. Names become names of folders and of TensorBoard runs.
        output: Folder of all runs and of the report.
        reference: The arm that all others are compared with and matched to; by default the first.
        seeds: Each arm is trained once for each seed. A seed draws initial weights, order of
            clips, times and noise alike in every arm.
        equal: What all arms have in common. ``parameters`` and ``flops`` (of a training step)
            change width and feed-forward width of an arm's transformer until they agree with the
            reference's within 2 %, at equal steps. ``training_flops`` changes the number of steps.
            ``seconds`` ends every training after ``seconds``.
        seconds: Duration of a training, for ``equal: seconds``.
        width_keys: Keys that must have the transformer's width when it is changed.
        overrides: Values by dotted key for all arms.
        scores: Names of the scores that are compared, say ``clip_loss`` or
            ``alignment/direction``.
        protocol: Arguments of ``python -m evaluation`` that score each run's last checkpoint, or
            several such lists by name, say of prompts in several styles, whose scores are then
            called ``name/score``; ``None`` samples and scores no videos.
        clip_losses: Measure the loss of each validation clip, at times and noise that are the same
            for all runs; for arms with the same objective.
        clip_overrides: Values by dotted key that replace those of the runs' data where clips are
            measured: arms that train at different sizes are compared on clips of the same.
        schedule: Where runs are started.
    """

    base: Path
    arms: dict[str, Arm]
    output: Path
    reference: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    equal: Literal["steps", "parameters", "flops", "training_flops", "seconds"] = "steps"
    seconds: float | None = None
    width_keys: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    scores: list[str] = field(default_factory=lambda: ["clip_loss"])
    protocol: list[str] | dict[str, list[str]] | None = None
    clip_losses: bool = True
    clip_overrides: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise ValueError(f"arms = {list(self.arms)}: a comparison needs at least two")
        for name in (*self.arms, *(self.protocol if isinstance(self.protocol, dict) else ())):
            if not _NAME.fullmatch(name):
                owner = "arms" if name in self.arms else "protocol"
                raise ValueError(
                    f"{owner}.{name}: a name has letters, digits, and . _ - after those"
                )
        if self.reference is not None and self.reference not in self.arms:
            near = suggestion(self.reference, self.arms)
            raise ValueError(f"reference = {self.reference!r}: there is no such arm. {near}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds = {self.seeds}: need one or more different ones, from 0 on")
        if (self.equal == "seconds") != (self.seconds is not None):
            raise ValueError(
                f"equal = {self.equal} and seconds = {self.seconds}: seconds are given if and only "
                "if equal is seconds"
            )
        if not self.scores:
            raise ValueError("scores = []: name at least one, such as clip_loss")
        for key in self.clip_overrides:
            if not key.startswith("data."):
                raise ValueError(f"clip_overrides.{key}: only keys of data can be overridden")
        for key, path in self._configs():
            if not find_config(path).is_file():
                raise ValueError(f"{key} = {str(path)!r}: there is no such file")
        for owner, overrides in self._overrides():
            for key in ("run_dir", *SEED_KEYS):
                if key in overrides:
                    raise ValueError(f"{owner}.{key}: is set by output and seeds; leave it out")

    @property
    def reference_arm(self) -> str:
        return self.reference or next(iter(self.arms))

    @property
    def other_arms(self) -> list[str]:
        return [name for name in self.arms if name != self.reference_arm]

    def configs(self, arm: str) -> list[Path]:
        """Return the YAMLs of an arm's trainings, each overriding the one before."""
        return [find_config(path) for path in (self.base, *self.arms[arm].configs)]

    def arguments(self, arm: str) -> list[str]:
        """Return what an arm's trainings give to ``fit`` beside YAMLs, seed, folder and size."""
        values = self.overrides | self.arms[arm].overrides
        return [argument(key, value) for key, value in values.items()]

    @property
    def protocols(self) -> dict[str, list[str]]:
        """Arguments of ``python -m evaluation`` by protocol, whose name is empty if it is alone."""
        if isinstance(self.protocol, dict):
            return self.protocol
        return {} if self.protocol is None else {"": self.protocol}

    def run_dir(self, arm: str, seed: int) -> Path:
        """Return the ``run_dir`` of a training."""
        return self.run_folder(arm, seed) / "training"

    def run_folder(self, arm: str, seed: int) -> Path:
        """Return the folder of a training, its scores and the stamps of both."""
        return self.output / arm / f"seed-{seed}"

    def _configs(self) -> Iterator[tuple[str, Path]]:
        yield "base", self.base
        for name, arm in self.arms.items():
            for index, path in enumerate(arm.configs):
                yield f"arms.{name}.configs[{index}]", path

    def _overrides(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "overrides", self.overrides
        for name, arm in self.arms.items():
            yield f"arms.{name}.overrides", arm.overrides


def report_folder(run: Path, protocol: str) -> Path:
    """Return the folder of a protocol's report in that of a run."""
    return run / "reports" / protocol if protocol else run / "report"


def written_reports(run: Path) -> dict[str, Path]:
    """Return the reports in the folder of a run, by protocol."""
    names = ["", *sorted(one.name for one in run.glob("reports/*"))]
    files = {name: report_folder(run, name) / "report.json" for name in names}
    return {name: file for name, file in files.items() if file.is_file()}


def argument(key: str, value: Any) -> str:
    """Return a value of a YAML as an argument of ``fit``."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def load_ablation(path: Path) -> Ablation:
    """Read the YAML of an ablation.

    Raises ``ValueError`` naming the file, the key and the rule for a key that there is not, a wrong
    type, a missing file, or values that do not fit together.
    """
    path = find_config(path)
    values = read_yaml(path)
    written = copy.deepcopy(values)
    with naming(f"{path}:"):
        found = build(Ablation, values)
    # As written, with a class_path and its init_args: ``fit`` parses them.
    arms = {
        name: replace(arm, overrides=(written["arms"][name] or {}).get("overrides") or {})
        for name, arm in found.arms.items()
    }
    overrides, clips = (written.get(key) or {} for key in ("overrides", "clip_overrides"))
    return replace(found, arms=arms, overrides=overrides, clip_overrides=clips)
