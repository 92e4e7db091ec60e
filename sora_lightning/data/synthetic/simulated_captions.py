"""Captions of rendered clips as a captioner with known faults would write them, and manifests in
which few clips have captions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sora_lightning.checks import require_in, require_seed
from sora_lightning.data.manifest.records import ManifestRow, read_table
from sora_lightning.data.manifest.tables import Row, moved_row, write_rows
from sora_lightning.data.synthetic.scenes import COLOURS, MovingShape, Scene, Turn, captions


def simulate_captions(
    manifest: Path,
    output: Path,
    by_people: float = 1.0,
    colour_errors: float = 0.0,
    unnamed: str | None = None,
    seed: int = 0,
    root: str | None = None,
) -> None:
    """Write a copy of a manifest of synthesize with three columns of captions from its scenes.

    caption holds two short wordings that are right, caption_descriptive is right, and
    caption_synthetic is descriptive, with faults.
    The clips are those of the manifest, so that their latents serve every copy.

    Args:
        manifest: A manifest that synthesize wrote.
        output: The manifest to write.
        by_people: Share of the clips that have the right captions, evenly spread; the others have
            the synthetic one alone.
        colour_errors: Share of the synthetic captions' words of colour that are exchanged for that
            of another colour.
        unnamed: A colour that synthetic captions never name.
        seed: Draws wordings and errors, for each row by itself.
        root: A folder, besides the manifest's own, under which the files may lie that it names.
    """
    require_in("[0, 1]", by_people=by_people, colour_errors=colour_errors)
    require_seed(seed)
    _check_copy(manifest, output)
    if unnamed is not None and unnamed not in COLOURS:
        raise ValueError(f"unnamed = {unnamed}: must be one of {', '.join(COLOURS)}")
    how = f"colour_errors={colour_errors}, unnamed={unnamed}, seed={seed}"
    rows = []
    for index, row in enumerate(read_table(manifest, root)):
        rng = np.random.default_rng([seed, index])
        short, varied, *_, long = captions(_scene(row), rng)
        moved = _without_captions(moved_row(row.columns, manifest.parent, output.parent))
        if _chosen(index, by_people):
            moved |= {"caption": [short, varied], "caption_descriptive": long}
        faulty = _with_errors(long, colour_errors, rng)
        rows.append(
            moved
            | {
                "caption_synthetic": _without_colour(faulty, unnamed),
                # By these columns `predict` tells a captioner's captions from those by people.
                "caption_synthetic_model": "simulated",
                "caption_synthetic_decoding": how,
            }
        )
    write_rows(output, rows)
    num_right = sum("caption" in row for row in rows)
    print(f"{output}: {len(rows)} rows, {num_right} with captions by people")


def hide_captions(manifest: Path, output: Path, kept: float, root: str | None = None) -> None:
    """Write a copy of a manifest in which only some clips have captions.

    The clips are those of the manifest, so that their latents serve every copy.

    Args:
        manifest: The manifest to copy.
        output: The manifest to write.
        kept: Share of the clips that keep their captions, evenly spread.
        root: A folder, besides the manifest's own, under which the files may lie that it names.
    """
    require_in("[0, 1]", kept=kept)
    _check_copy(manifest, output)
    rows = []
    for index, row in enumerate(read_table(manifest, root)):
        moved = _without_captions(moved_row(row.columns, manifest.parent, output.parent))
        if _chosen(index, kept):
            moved |= {name: cell for name, cell in row.columns.items() if name not in moved}
        rows.append(moved)
    write_rows(output, rows)
    num_kept = sum(_chosen(index, kept) for index in range(len(rows)))
    print(f"{output}: {len(rows)} rows, {num_kept} with captions")


def _check_copy(manifest: Path, output: Path) -> None:
    if output.resolve() == manifest.resolve():
        raise ValueError(f"output = {output}: is the manifest itself; it is copied")


def _chosen(index: int, share: float) -> bool:
    """Return True for ``share`` of all rows, evenly spread."""
    return int((index + 1) * share) > int(index * share)


def _scene(row: ManifestRow) -> Scene:
    scene: dict[str, Any] | None = row.columns.get("scene")
    if not isinstance(scene, dict):
        raise row.error("scene", "is missing: captions follow from it, in manifests of synthesize")
    shapes = [
        MovingShape(**{**one, "turns": tuple(Turn(*turn) for turn in one["turns"])})
        for one in scene["shapes"]
    ]
    return Scene(**{**scene, "shapes": tuple(shapes)})


def _without_captions(row: Row) -> Row:
    return {name: cell for name, cell in row.items() if not name.startswith("caption")}


def _with_errors(caption: str, rate: float, rng: np.random.Generator) -> str:
    def exchanged(match: re.Match[str]) -> str:
        others = [colour for colour in COLOURS if colour != match[0]]
        other = others[rng.integers(len(others))]
        return other if rng.random() < rate else match[0]

    return re.sub(rf"\b({'|'.join(COLOURS)})\b", exchanged, caption)


def _without_colour(caption: str, colour: str | None) -> str:
    return caption if colour is None else re.sub(rf"\b{colour} ", "", caption)
