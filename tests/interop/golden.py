"""Weights made from their names, and outputs of reference code recorded with them.

A file in ``data/`` holds what ``record.py`` wrote: inputs, the reference's output, tables that it
computes, and in its metadata the name and shape of every weight. The weights themselves are made
again here, each from a seed that its name gives.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parent / "data"


def seeded(name: str, shape: Sequence[int], scale: float = 0.1) -> Tensor:
    """Normal values that depend on the name and the shape alone; around 1 for a norm's scale."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = scale * torch.randn(*shape, generator=generator)
    is_scale = "norm" in name and name.endswith("weight") and len(shape) == 1
    return 1 + values if is_scale else values


@dataclass(frozen=True)
class Golden:
    """One recorded case."""

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    output: Tensor

    @classmethod
    def load(cls, case: str) -> Golden:
        path = DATA / f"{case}.safetensors"
        held = load_file(path)
        with safe_open(path, "pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
        tables = {name.removeprefix("table."): held[name] for name in held if "table." in name}
        return cls(
            weights={
                name: tables[name] if name in tables else seeded(name, shape)
                for name, shape in shapes.items()
            },
            inputs={name.removeprefix("input."): held[name] for name in held if "input." in name},
            output=held["output"],
        )


def save(
    case: str,
    weights: Mapping[str, Tensor],
    tables: Sequence[str],
    inputs: Mapping[str, Tensor],
    output: Tensor,
) -> None:
    """Write a case; ``tables`` are the weights that are no seeded values."""
    held = {f"input.{name}": tensor for name, tensor in inputs.items()}
    held |= {f"table.{name}": weights[name].contiguous() for name in tables}
    shapes = json.dumps({name: list(tensor.shape) for name, tensor in weights.items()})
    DATA.mkdir(exist_ok=True)
    save_file(
        {**held, "output": output.contiguous()},
        DATA / f"{case}.safetensors",
        metadata={"shapes": shapes},
    )
