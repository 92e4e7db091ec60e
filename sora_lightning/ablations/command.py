"""``sora-lightning ablate``: plan, run and report an ablation."""

from __future__ import annotations

from pathlib import Path

from sora_lightning.ablations.plan import make_plan, plan_text
from sora_lightning.ablations.spec import load_ablation


def ablate(config: Path, plan: bool = False) -> None:
    """Train every arm of an ablation with every seed, score the runs, and compare the arms.

    Finished runs are skipped and interrupted ones resumed. A run that fails leaves the others
    running and is named at the end.

    Args:
        config: The YAML of the ablation, such as experiments/ablations/attention.yaml.
        plan: Build every arm without weights, print what would run and its cost, and stop.
    """
    ablation = load_ablation(Path(config))
    arms = make_plan(ablation)
    print(plan_text(ablation, arms))
    if plan:
        return
