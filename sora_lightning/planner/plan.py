"""A plan's YAML: a model, its variants and sizes, and claims to check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from sora_lightning.checkpoints import build
from sora_lightning.cli import explain
from sora_lightning.cli.sources import merge
from sora_lightning.cli.training_cost import on_meta
from sora_lightning.planner.counting import Count, count
from sora_lightning.planner.devices import Device, device_named
from sora_lightning.planner.estimates import (
    TRAINING_BYTES,
    WEIGHT_BYTES,
    Estimate,
    Parallelism,
    Workload,
    estimate,
)
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import VideoSize


@dataclass(frozen=True)
class Claim:
    """A published figure: ``quantity`` is a key of ``QUANTITIES``, to which ``value`` is compared
    with relative ``tolerance`` in ``variant``.
    """

    text: str
    variant: str
    quantity: str
    value: float
    tolerance: float = 0.02


@dataclass(frozen=True)
class PlanSettings:
    """``sizes`` are counted for each of ``variants``, which override keys of the model; a variant's
    own ``size`` takes their place.
    """

    sizes: list[str] = field(default_factory=list)
    device: str = "H100"
    parallelism: Parallelism = field(default_factory=Parallelism)
    workload: Workload = field(default_factory=Workload)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One size of one variant."""

    variant: str
    size: str
    count: Count
    estimate: Estimate


# What a claim can be about: functions of a row and the device.
QUANTITIES: dict[str, Callable[[Row, Device], float]] = {
    "tokens": lambda row, _: row.count.tokens,
    "parameters": lambda row, _: row.count.parameters,
    "gpus to sample": lambda row, _: row.estimate.fewest_sampling_gpus,
    "gpus for weights": lambda row, gpu: -(-WEIGHT_BYTES * row.count.parameters // gpu.memory),
    "gpus for training states": lambda row, gpu: (
        -(-TRAINING_BYTES * row.count.parameters // gpu.memory)
    ),
    "gpus equal to TPU v3-256": lambda _, gpu: (
        128 * device_named("TPUv3").bf16_flops / gpu.bf16_flops
    ),
}


def settings_of(values: Mapping[str, Any]) -> PlanSettings:
    """Return the settings under ``plan``, by default with the sizes under ``data.batching``.

    Raises ``ValueError`` naming a key that is not known or of a wrong type.
    """
    given = dict(values.get("plan") or {})
    given.setdefault("sizes", ((values.get("data") or {}).get("batching") or {}).get("sizes") or [])
    settings = explain.build(PlanSettings, given, "plan")
    if not settings.sizes and any("size" not in one for one in settings.variants.values() or [{}]):
        raise ValueError("plan.sizes is missing: say which sizes are planned, e.g. [17x256x256]")
    for index, claim in enumerate(settings.claims):
        if claim.quantity not in QUANTITIES:
            raise ValueError(
                f"plan.claims[{index}].quantity = {claim.quantity!r}: the quantities are "
                f"{', '.join(QUANTITIES)}"
            )
        if claim.variant not in settings.variants:
            raise ValueError(f"plan.claims[{index}].variant = {claim.variant!r} is no variant")
    return settings


def model_of(values: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the model of a YAML. Raises ``ValueError`` if there is none."""
    if not isinstance(model := values.get("model"), dict):
        raise ValueError(f"{source}: has no key model: plan needs the YAML of a training")
    return model


def make_rows(values: Mapping[str, Any], settings: PlanSettings, source: Path) -> list[Row]:
    """Count and estimate every size of every variant.

    Raises ``ValueError`` if the model is missing, cannot be built or does not fit a size.
    """
    base = model_of(values, source)
    device, rows = device_named(settings.device), []
    for name, variant in (settings.variants or {"model": {}}).items():
        model = merge(base, variant.get("model") or {})
        with on_meta():
            system = build_system(model, source)
        for text in [variant["size"]] if "size" in variant else settings.sizes:
            counted = count(system, VideoSize.parse(text))
            result = estimate(counted, device, settings.parallelism, settings.workload)
            rows.append(Row(name, text, counted, result))
    return rows


def build_system(model: dict[str, Any], source: Path) -> DiffusionSystem:
    """Build the system of a YAML. Raises ``ValueError`` naming ``source`` if it cannot be built or
    is of another kind.
    """
    try:
        system = build(LightningModule, model, source)
    except ValueError as error:
        message = str(error).removeprefix(f"{source}: ")
        raise ValueError(f"{source}: {explain.condense(message)}") from error
    if not isinstance(system, DiffusionSystem):
        raise ValueError(f"{source}: model is a {type(system).__name__}: plan a DiffusionSystem")
    return system


def verdict(claim: Claim, rows: list[Row], device: Device) -> tuple[bool, float]:
    """Return True if a claim holds, and the value that was found."""
    row = next(row for row in rows if row.variant == claim.variant)
    found = float(QUANTITIES[claim.quantity](row, device))
    return abs(found - claim.value) <= claim.tolerance * abs(found), found
