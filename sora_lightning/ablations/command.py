"""``sora-lightning ablate``: plan, run and report an ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sora_lightning.ablations.plan import (
    PlannedArm,
    make_plan,
    plan_text,
    read_plan,
    write_plan,
)
from sora_lightning.ablations.report import write_report
from sora_lightning.ablations.results import read_results
from sora_lightning.ablations.runs import plan_runs, run_all
from sora_lightning.ablations.spec import Ablation, load_ablation
from sora_lightning.ablations.tensorboard import write_hyperparameters, write_tensorboard


def ablate(config: Path, plan: bool = False, report: bool = False) -> None:
    """Train every arm of an ablation with every seed, score the runs, and compare the arms.

    Finished runs are skipped and interrupted ones resumed. A run that fails leaves the others
    running and is named at the end. The report is written in every case.

    Args:
        config: The YAML of the ablation, such as experiments/ablations/attention.yaml.
        plan: Build every arm without weights, print what would run and its cost, and stop.
        report: Train nothing, and report on the runs that are there.
    """
    ablation = load_ablation(Path(config))
    written = ablation.output / "plan.json"
    if report:
        _report(ablation, read_plan(written))
        return
    arms = make_plan(ablation)
    print(plan_text(ablation, arms), flush=True)
    if plan:
        return
    write_plan(arms, written)
    write_hyperparameters(ablation, arms)
    try:
        run_all(ablation, plan_runs(ablation, arms))
    finally:
        _report(ablation, arms)


def _report(ablation: Ablation, arms: Sequence[PlannedArm]) -> None:
    runs = plan_runs(ablation, arms)
    results = read_results(runs)
    path = write_report(ablation, arms, runs, results)
    write_tensorboard(ablation, arms, runs, results)
    print(f"\nThe report   {path}, and report.html, report.csv beside it")
    print(
        f"The curves   tensorboard --logdir {ablation.output}/tensorboard --port 6006"
        "\n             http://localhost:6006/#custom_scalars has the margins over seeds,"
        "\n             http://localhost:6006/#hparams the table of arms and scores"
    )
