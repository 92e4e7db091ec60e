"""The report of an ablation, ``report.html``, ``.md`` and ``.csv``, on whatever runs there are."""

from __future__ import annotations

import base64
import csv
import itertools
import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from sora_lightning.ablations.plan import PlannedArm
from sora_lightning.ablations.power_law import PowerLaw, fit_power_law
from sora_lightning.ablations.results import RunResult
from sora_lightning.ablations.runs import Run
from sora_lightning.ablations.samples import draw_samples
from sora_lightning.ablations.spec import Ablation
from sora_lightning.ablations.statistics import (
    Difference,
    Interval,
    paired_difference,
    t_interval,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUM_STRATA = 3
_FEW_FILES = 12  # as many as fit beside one another
_AXES = {
    "flops.png": "FLOPs of the training",
    "seconds.png": "seconds of the training",
    "attention_distance.png": "average attention distance",
}
_STYLE = (
    "body{margin:2em auto;max-width:70em;padding:0 1em;font:15px/1.5 system-ui,sans-serif}"
    "table{border-collapse:collapse;margin:1em 0}th,td{padding:4px 12px 4px 0;text-align:left;"
    "border-bottom:1px solid #ccc}code,pre{font:12.5px monospace}img{max-width:100%}"
)


@dataclass(frozen=True)
class Table:
    """A table of texts under a heading, with a note below it."""

    heading: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def write_report(
    ablation: Ablation, arms: Sequence[PlannedArm], runs: Sequence[Run], results: list[RunResult]
) -> Path:
    """Write the report to the ablation's folder and return the path of ``report.md``."""
    tables = [
        _arms_table(arms, results),
        *(_scores_table(ablation, name, results) for name in ablation.scores),
        *_strata_tables(ablation, results),
        *_power_law_tables(ablation, arms, results),
    ]
    output = ablation.output
    output.mkdir(parents=True, exist_ok=True)
    plots = _draw_plots(ablation, arms, results)
    if draw_samples(runs, output / "samples.gif"):
        plots["samples.gif"] = "Samples of equal prompts and seeds"
    finished = sum(one.finished for one in results)
    facts = f"{finished} of {len(runs)} runs are finished. Commit {_commit()}."
    commands = _commands(ablation, runs)
    _write_csv(results, output / "report.csv")
    title = f"Ablation {output.name}"
    (output / "report.md").write_text(_markdown(title, facts, tables, plots, commands))
    (output / "report.html").write_text(_html(title, facts, tables, output, plots, commands))
    return output / "report.md"


def differences(ablation: Ablation, score: str, results: Sequence[RunResult]) -> list[Difference]:
    """Return the difference of each arm from the reference, of arms that share a seed with it."""
    found = []
    reference = _values(results, ablation.reference_arm, score)
    for arm in ablation.other_arms:
        values = _values(results, arm, score)
        if values.keys() & reference.keys():
            better = next(r.scores[score].better for r in results if score in r.scores)
            found.append(paired_difference(arm, score, values, reference, better))
    return found


def _values(results: Sequence[RunResult], arm: str, score: str) -> dict[int, list[float]]:
    ours = [one for one in results if one.arm == arm and one.finished and score in one.scores]
    return {one.seed: one.scores[score].values for one in ours}


def _arms_table(arms: Sequence[PlannedArm], results: Sequence[RunResult]) -> Table:
    rows = []
    for arm in arms:
        own = [one for one in results if one.arm == arm.name]
        seconds = [one.step_s for one in own if one.step_s is not None]
        cost = arm.cost
        rows.append(
            (
                arm.name,
                f"{cost.parameters:,}",
                f"{cost.flops:.4g}",
                f"{arm.training_flops:.4g}",
                f"{np.mean(seconds):.3g}" if seconds else "",
                "" if cost.attention_distance is None else f"{cost.attention_distance:.3f}",
                "" if cost.attended_share is None else f"{100 * cost.attended_share:.1f} %",
                f"{sum(one.finished for one in own)}",
            )
        )
    head = ("arm", "parameters", "FLOPs a step", "FLOPs in all", "s a step")
    note = (
        "AD is the average attention distance, attended the share of a clip's tokens that one "
        "attention sees, both computed from the partitions on the first size."
    )
    return Table("Arms", (*head, "AD", "attended", "finished runs"), rows, note)


def _scores_table(ablation: Ablation, score: str, results: Sequence[RunResult]) -> Table:
    against = {one.arm: one for one in differences(ablation, score, results)}
    rows = []
    for arm in (ablation.reference_arm, *ablation.other_arms):
        values = _values(results, arm, score)
        if not values:
            rows.append((arm, "no finished run", "", "", "", ""))
            continue
        mean = t_interval([float(np.mean(one)) for one in values.values()])
        cells = ("reference", "", "")
        if (found := against.get(arm)) is not None:
            items = "" if found.over_items is None else _shown(found.over_items)
            cells = (_shown(found.over_seeds), items, found.verdict)
        elif arm != ablation.reference_arm:
            cells = ("no seed in common", "", "")
        rows.append((arm, _shown(mean), str(mean.n), *cells))
    head = ("arm", "mean (95 %)", "seeds", "difference, over seeds", "over clips or prompts")
    note = (
        "Differences are paired by seed. Intervals are Student's t, which takes the values over "
        "seeds for independent and normal. A verdict needs both intervals to exclude 0."
    )
    return Table(score, (*head, "verdict"), rows, note)


def _strata_tables(ablation: Ablation, results: Sequence[RunResult]) -> list[Table]:
    """Return the difference of ``clip_loss`` by how far shapes move, where that is known, by the
    size of the clips, where there are several, and by their file, where there are few.
    """
    of = f"Difference of clip_loss from {ablation.reference_arm}, over seeds, for "
    tables = []
    if moved := next((one.displacements for one in results if one.displacements), []):
        bounds = np.quantile(moved, np.linspace(0, 1, _NUM_STRATA + 1))
        stratum = np.searchsorted(bounds[1:-1], moved, side="right")
        names = [f"{low:.2f} to {high:.2f}" for low, high in itertools.pairwise(bounds)]
        note = (
            f"{of}equal numbers of clips whose fastest shape moves so many tokens from one latent "
            "frame to the next."
        )
        strata = {name: stratum == number for number, name in enumerate(names)}
        tables += _strata_table(ablation, results, "displacement", strata, note)
    sizes = np.array(next((one.sizes for one in results if one.sizes), []))
    strata = {name: sizes == name for name in sorted(set(sizes.tolist()))}
    if len(strata) > 1:
        tables += _strata_table(ablation, results, "size", strata, f"{of}the clips of each size.")
    files = np.array(next((one.files for one in results if one.files), []))
    strata = {name: files == name for name in sorted(set(files.tolist()))}
    if 1 < len(strata) <= _FEW_FILES:
        tables += _strata_table(ablation, results, "file", strata, f"{of}the clips of each file.")
    return tables


def _strata_table(
    ablation: Ablation,
    results: Sequence[RunResult],
    quantity: str,
    strata: Mapping[str, Bool[np.ndarray, " n"]],
    note: str,
) -> list[Table]:
    """Return a table with a column for each stratum, of those clips where it is True; none before
    an arm and the reference have finished with a seed in common.
    """
    reference = _values(results, ablation.reference_arm, "clip_loss")
    rows = []
    for arm in ablation.other_arms:
        values = _values(results, arm, "clip_loss")
        if not values.keys() & reference.keys():
            continue
        cells = [arm]
        for chosen in strata.values():
            a, b = ({seed: np.array(of_seed)[chosen].tolist() for seed, of_seed in side.items()}
                    for side in (values, reference))  # fmt: skip
            cells.append(_shown(paired_difference(arm, "clip_loss", a, b, "lower").over_seeds))
        rows.append(tuple(cells))
    heading = f"clip_loss by {quantity}"
    return [Table(heading, ("arm", *strata), rows, note)] if rows else []


def _power_law_tables(
    ablation: Ablation, arms: Sequence[PlannedArm], results: Sequence[RunResult]
) -> list[Table]:
    """Return the exponents of the scores that have a power law in the FLOPs of the training."""
    laws = {score: _power_law(score, arms, results) for score in ablation.scores}
    rows = [
        (score, f"{law.exponent:.4g} ({law.low:.4g} to {law.high:.4g})", f"{law.factor:.4g}")
        for score, law in laws.items()
        if law is not None
    ]
    note = (
        "score = factor x FLOPs^-exponent, least squares on logarithms of the means over seeds; "
        "the interval is a bootstrap over seeds."
    )
    return [Table("Power laws", ("score", "exponent (95 %)", "factor"), rows, note)] if rows else []


def _power_law(
    score: str, arms: Sequence[PlannedArm], results: Sequence[RunResult]
) -> PowerLaw | None:
    values = {
        arm.name: {s: float(np.mean(v)) for s, v in _values(results, arm.name, score).items()}
        for arm in arms
    }
    return fit_power_law({arm.name: arm.training_flops for arm in arms}, values)


def _draw_plots(
    ablation: Ablation, arms: Sequence[PlannedArm], results: Sequence[RunResult]
) -> dict[str, str]:
    """Draw the scores against FLOPs, seconds and attention distance, as far as they are known, and
    those of several protocols together. Return what the files show, by their names.
    """
    intervals = {
        score: {
            arm.name: t_interval([float(np.mean(v)) for v in values.values()])
            for arm in arms
            if (values := _values(results, arm.name, score))
        }
        for score in ablation.scores
    }
    intervals = {score: found for score, found in intervals.items() if found}
    drawn = {}
    if isinstance(ablation.protocol, dict) and intervals:
        _draw_protocols(ablation.output / "protocols.png", list(ablation.protocol), intervals)
        drawn["protocols.png"] = "Scores by arm and protocol"
    for name, axis in _AXES.items():
        places = {arm.name: _place(name, arm, results) for arm in arms}
        known = {arm: x for arm, x in places.items() if x and math.isfinite(x)}
        if not known or not intervals:
            continue
        laws = {
            score: _power_law(score, arms, results) if name == "flops.png" else None
            for score in intervals
        }
        _draw(ablation.output / name, axis, known, intervals, laws)
        drawn[name] = f"{', '.join(intervals)} against {axis}"
    return drawn


def _place(name: str, arm: PlannedArm, results: Sequence[RunResult]) -> float | None:
    """Return where an arm stands on the axis of a plot."""
    if name == "flops.png":
        return arm.training_flops
    if name == "attention_distance.png":
        return arm.cost.attention_distance
    seconds = [one.step_s for one in results if one.arm == arm.name and one.step_s]
    return arm.max_steps * float(np.mean(seconds)) if seconds else None


def _draw(
    path: Path,
    axis: str,
    places: Mapping[str, float],
    values: Mapping[str, Mapping[str, Interval]],
    laws: Mapping[str, PowerLaw | None],
) -> None:
    """Draw a panel for each score."""
    figure, panels = _figure(len(values))
    for axes, (score, of_arms) in zip(panels, values.items(), strict=True):
        for arm, value in of_arms.items():
            if arm not in places:
                continue
            error = value.high - value.mean if math.isfinite(value.high) else 0.0
            axes.errorbar(places[arm], value.mean, yerr=error, marker="o", capsize=4, label=arm)
        axes.set(xlabel=axis, ylabel=f"{score}, mean and 95 % over seeds")
        if (law := laws[score]) is not None:
            ends = [min(places.values()), max(places.values())]
            label = f"exponent -{law.exponent:.3f}"
            axes.plot(ends, [law(x) for x in ends], color="gray", linestyle="--", label=label)
            axes.set(xscale="log", yscale="log")
        axes.grid(which="both", alpha=0.2)
        axes.legend(frameon=False)
    figure.savefig(path)


def _draw_protocols(
    path: Path, protocols: Sequence[str], values: Mapping[str, Mapping[str, Interval]]
) -> None:
    """Draw a panel for each score over the arms, with a line for each protocol that has it."""
    names = dict.fromkeys(score.partition("/")[2] for score in values)
    arms = list(dict.fromkeys(arm for of_arms in values.values() for arm in of_arms))
    figure, panels = _figure(len(names))
    for axes, name in zip(panels, names, strict=True):
        for index, protocol in enumerate(protocols):
            of_arms = values.get(f"{protocol}/{name}", {})
            places = [arms.index(arm) + 0.06 * index for arm in of_arms]  # side by side
            means = [one.mean for one in of_arms.values()]
            errors = [one.high - one.mean for one in of_arms.values()]
            errors = [error if math.isfinite(error) else 0.0 for error in errors]
            axes.errorbar(places, means, yerr=errors, marker="o", capsize=4, label=protocol)
        axes.set_xticks(range(len(arms)), arms)
        axes.set(ylabel=f"{name}, mean and 95 % over seeds")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
    figure.savefig(path)


def _figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * num_panels, 4), layout="constrained", dpi=110)
    return figure, list(np.ravel(figure.subplots(1, num_panels)))


def _shown(value: Interval) -> str:
    if math.isinf(value.low):
        return f"{value.mean:.4g}"
    return f"{value.mean:.4g} ({value.low:.4g} to {value.high:.4g})"


def _commit() -> str:
    """Return the commit of the working directory; ``unknown`` outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _commands(ablation: Ablation, runs: Sequence[Run]) -> str:
    """Return the training of each arm with the first seed, an option a line."""
    first = ablation.seeds[0]
    lines = [f"# seed {first}; of another, its number in place of {first}, and its run_dir"]
    for run in runs:
        if run.seed == first:
            words = run.stages[0].command
            options = (
                f"\\\n    {shlex.quote(w)}" if w[:2] == "--" else shlex.quote(w) for w in words
            )
            lines.append(" ".join(options))
    return "\n".join(lines)


def _write_csv(results: Sequence[RunResult], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("arm", "seed", "finished", "score", "value", "n", "better"))
        for one in results:
            for name, score in sorted(one.scores.items()):
                cells = (name, f"{score.mean:.6g}", len(score.values), score.better)
                writer.writerow((one.arm, one.seed, one.finished, *cells))


def _markdown(
    title: str, facts: str, tables: Sequence[Table], plots: dict[str, str], commands: str
) -> str:
    parts = [f"# {title}", facts]
    for table in tables:
        lines = [table.head, ("---",) * len(table.head), *table.rows]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        parts += [f"## {table.heading}", body, table.note]
    parts += [f"![{alt}]({name})" for name, alt in plots.items()]
    parts += ["## Commands", f"```sh\n{commands}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _html(
    title: str,
    facts: str,
    tables: Sequence[Table],
    folder: Path,
    plots: dict[str, str],
    commands: str,
) -> str:
    parts = [f"<h1>{escape(title)}</h1><p>{escape(facts)}</p>"]
    for table in tables:
        parts.append(f"<h2>{escape(table.heading)}</h2><table>")
        for tag, cells in (("th", table.head), *(("td", row) for row in table.rows)):
            row = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
            parts.append(f"<tr>{row}</tr>")
        parts.append(f"</table><p>{escape(table.note)}</p>")
    for name, alt in plots.items():
        data = base64.b64encode((folder / name).read_bytes()).decode()
        kind = Path(name).suffix[1:]
        parts.append(f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">')
    parts.append(f"<h2>Commands</h2><pre>{escape(commands)}</pre>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"
