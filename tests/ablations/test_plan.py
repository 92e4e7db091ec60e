"""A plan names mistakes before anything runs, counts every arm, and matches what is to be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sora_lightning.__main__ import main
from sora_lightning.ablations.plan import PlannedArm, make_plan
from sora_lightning.ablations.spec import load_ablation
from sora_lightning.cli.training_cost import build_training, step_flops
from tests.ablations.conftest import DENOISER, ablation, base, write

_WIDTH = "model.init_args.conditioner.init_args.width"


def _plan(**changes: Any) -> dict[str, PlannedArm]:
    arms = make_plan(load_ablation(write("ablation.yaml", ablation(**changes))))
    return {arm.name: arm for arm in arms}


def _rebuilt(arm: PlannedArm) -> Any:
    configs = [part for path in arm.configs for part in ("--config", str(path))]
    return build_training([*configs, *arm.arguments, "--run_dir=other"])


def test_flops_of_a_step_are_those_of_the_formula(place: Path) -> None:
    """2 FLOPs a multiplication; 12 n d^2 + 2 n^2 d of them in each block, and those of the text's
    attention; the backward pass takes twice the forward's."""
    training = build_training(["--config", "base.yaml", "--run_dir=x"])
    twice = base()
    twice["data"]["batching"]["pixels_per_batch"] *= 2
    write("twice.yaml", twice)
    doubled = build_training(["--config", "twice.yaml", "--run_dir=x"])
    assert step_flops(doubled) == pytest.approx(2 * step_flops(training), rel=1e-6)
    tokens, width, text, depth, clips = 5 * 4 * 4, 32, 16, 2, 2
    per_block = 12 * tokens * width**2 + 2 * tokens**2 * width
    per_block += 2 * tokens * width**2 + 2 * text * width**2 + 2 * tokens * text * width
    expected = 2 * 3 * clips * depth * per_block
    assert step_flops(training) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("quantity", ["parameters", pytest.param("flops", marks=pytest.mark.slow)])
def test_arms_are_matched_within_two_per_cent(place: Path, quantity: str) -> None:
    wide = {"configs": ["factorised.yaml"], "overrides": {f"{DENOISER}.size.mlp_ratio": 6}}
    changes = {"arms": {"joint": {"configs": ["joint.yaml"]}, "factorised": wide}}
    unmatched = _plan(**changes)
    values = [getattr(arm.cost, quantity) for arm in unmatched.values()]
    assert values[1] > 1.05 * values[0]
    arms = _plan(equal=quantity, width_keys=[_WIDTH], **changes)
    joint, factorised = arms["joint"], arms["factorised"]
    assert joint.cost == unmatched["joint"].cost
    assert getattr(factorised.cost, quantity) == pytest.approx(
        getattr(joint.cost, quantity), rel=0.02
    )
    built = _rebuilt(factorised)
    size = built.model["init_args"]["denoiser"]["init_args"]["size"]
    assert size["width"] < 32
    assert built.model["init_args"]["conditioner"]["init_args"]["width"] == size["width"]
    assert factorised.max_steps == joint.max_steps == 2


def test_equal_flops_of_training_change_the_steps(place: Path) -> None:
    arms = _plan(equal="training_flops", overrides={"trainer.max_steps": 1000})
    joint, factorised = arms["joint"], arms["factorised"]
    assert joint.max_steps == 1000 > factorised.max_steps
    assert factorised.training_flops == pytest.approx(joint.training_flops, rel=1e-3)
    assert f"--trainer.max_steps={factorised.max_steps}" in factorised.arguments


def test_equal_seconds_set_the_time_of_every_training(place: Path) -> None:
    arms = _plan(equal="seconds", seconds=3700)
    for arm in arms.values():
        assert arm.arguments[-1] == "--trainer.max_time=00:01:01:40"
        assert _rebuilt(arm).max_steps == -1


def test_overrides_reach_the_trainings_also_where_they_name_a_class(place: Path) -> None:
    block = "sora_lightning.denoisers.conditioning_variants.UngatedAdaLNBlock"
    parts = {
        "class_path": "sora_lightning.denoisers.DiTParts",
        "init_args": {"block": {"class_path": block}},
    }
    arms = {"joint": {}, "other": {"overrides": {f"{DENOISER}.parts": parts}}}
    other = _plan(arms=arms, overrides={"trainer.max_steps": 9})["other"]
    built = _rebuilt(other)
    denoiser: Any = built.system.denoiser
    assert type(denoiser.blocks[0]).__name__ == "UngatedAdaLNBlock"
    assert built.max_steps == other.max_steps == 9


def test_a_plan_shows_parameters_flops_and_attention_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.iterdir())
    path = str(write("ablation.yaml", ablation()))
    assert main(["ablate", path, "--plan"]) == 0
    head, joint, factorised, total = capsys.readouterr().out.splitlines()[-4:]
    assert head.split()[0] == "arm"
    assert joint.split()[0] == "joint"
    assert "1.000" in joint
    assert "100.0 %" in joint
    assert factorised.split()[0] == "factorised"
    assert "4 runs" in total
    assert sorted(place.iterdir()) == sorted([*before, place / "ablation.yaml"])


def _arm(**change: Any) -> dict[str, Any]:
    return {"arms": {"joint": {}, "other": change}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seedz": [1]}, "seedz: no such key in Ablation. Did you mean seeds?"),
        (_arm(confgs=[]), "arms.other.confgs: no such key in Arm. Did you mean configs?"),
        (_arm(configs=["jont.yaml"]), "arms.other.configs[0] = 'jont.yaml': there is no such file"),
        (_arm(overrides={"run_dir": "x"}), "arms.other.overrides.run_dir: is set by output"),
        (_arm(overrides={"trainer.max_step": 3}), "arms.other: trainer.max_step: no such key in"),
        (_arm(overrides={f"{DENOISER}.size.num_heads": 3}), "arms.other: "),
        (_arm(overrides={"data.manifest": "x.jsonl"}), "arms.other: data.manifest = 'x.jsonl'"),
        ({"arms": {"joint": {}}}, "arms = ['joint']: a comparison needs at least two"),
        ({"arms": {"a/b": {}, "c": {}}}, "arms.a/b: a name has"),
        ({"seeds": []}, "seeds = []: need one or more"),
        ({"seeds": [1, 1]}, "seeds = [1, 1]: need one or more different ones"),
        ({"seeds": ["a"]}, "seeds"),
        ({"equal": "flop"}, "equal"),
        ({"equal": "seconds"}, "equal = seconds and seconds = None"),
        ({"reference": "jont"}, "reference = 'jont': there is no such arm. Did you mean joint?"),
        ({"scores": []}, "scores = []: name at least one"),
        ({"clip_overrides": {"model.x": 1}}, "clip_overrides.model.x: only keys of data"),
        ({"clip_overrides": {"data.siz": 1}}, "arms.joint: data.siz: no such key in"),
        ({"schedule": {"at_once": 0}}, "schedule.at_once = 0: must be at least 1"),
        (
            {"schedule": {"at_one": 1}},
            "schedule.at_one: no such key in Schedule. Did you mean at",
        ),
        ({"base": "bse.yaml"}, "base = 'bse.yaml': there is no such file"),
        ({"equal": "parameters", "overrides": {"trainer.max_steps": -1}}, "trainer.max_steps = -1"),
        ({"equal": "parameters", "width_keys": ["model.init_args.x.y"]}, "there is no x in the"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_sentence(
    place: Path, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write("ablation.yaml", ablation(**changes)))
    assert main(["ablate", path, "--plan"]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("sora-")]
    assert said in line


def test_an_arm_that_no_width_matches_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = {f"{DENOISER}.size.depth": 12, f"{DENOISER}.size.num_heads": 16}
    arms = {"joint": {}, "deep": {"overrides": deep}}
    path = str(write("ablation.yaml", ablation(arms=arms, equal="parameters")))
    assert main(["ablate", path, "--plan"]) == 2
    assert "at depth 12: change the arm's depth" in capsys.readouterr().err
