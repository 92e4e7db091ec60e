"""Conversion between the weight names of public I3D files.

``pytorch`` is the scheme of the PyTorch conversions used by FVD code (``Mixed_3b.b1a.bn.bias``),
and of this package. ``kinetics`` is that of the older port of the Kinetics weights
(``mixed_3b.branch_1.0.batch3d.bias``). ``tensorflow`` is that of the original variables, whose
kernels end in (in, out) and which have no gamma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

SCHEMES = ("pytorch", "kinetics", "tensorflow")
_STEM = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
_MIXED = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
_BRANCHES = {
    "b0": ("branch_0", "Branch_0/Conv3d_0a_1x1"),
    "b1a": ("branch_1.0", "Branch_1/Conv3d_0a_1x1"),
    "b1b": ("branch_1.1", "Branch_1/Conv3d_0b_3x3"),
    "b2a": ("branch_2.0", "Branch_2/Conv3d_0a_1x1"),
    "b2b": ("branch_2.1", "Branch_2/Conv3d_0b_3x3"),
    "b3b": ("branch_3.1", "Branch_3/Conv3d_0b_1x1"),
}
_TENSORFLOW_ROOT = "RGB/inception_i3d/"
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class _Name:
    """Name of a weight in the ``pytorch`` scheme, and conversions of its values to and from it."""

    pytorch: str
    inward: Callable[[Tensor], Tensor]
    outward: Callable[[Tensor], Tensor]


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _kernel_inward(value: Tensor) -> Tensor:
    return rearrange(value, "f h w i o -> o i f h w")


def _kernel_outward(value: Tensor) -> Tensor:
    return rearrange(value, "o i f h w -> f h w i o").contiguous()


def _spread(value: Tensor) -> Tensor:
    return rearrange(value, "c -> 1 1 1 1 c")


def _units() -> list[tuple[str, str, str]]:
    """Names of each convolution with its norm in the three schemes."""
    units = [(name, name.lower(), name) for name in _STEM]
    for mixed in _MIXED:
        for branch, (kinetics, tensorflow) in _BRANCHES.items():
            # A naming error of the original graph, present in all of its weights.
            misnamed = mixed == "5b" and branch == "b2b"
            variable = "Branch_2/Conv3d_0a_3x3" if misnamed else tensorflow
            pytorch = f"Mixed_{mixed}"
            units.append(
                (f"{pytorch}.{branch}", f"{pytorch.lower()}.{kinetics}", f"{pytorch}/{variable}")
            )
    return units


def _names(scheme: str) -> dict[str, _Name]:
    """Names and conversions by the scheme's names, without the counters of batch norms."""
    names = {}
    for pytorch, kinetics, tensorflow in _units():
        norms = ("weight", "bias", "running_mean", "running_var")
        if scheme == "tensorflow":
            root = _TENSORFLOW_ROOT + tensorflow
            kernel = _Name(f"{pytorch}.conv3d.weight", _kernel_inward, _kernel_outward)
            names[f"{root}/conv_3d/w"] = kernel
            variables = (None, "beta", "moving_mean", "moving_variance")
            for norm, variable in zip(norms, variables, strict=True):
                if variable:
                    name = _Name(f"{pytorch}.bn.{norm}", torch.flatten, _spread)
                    names[f"{root}/batch_norm/{variable}"] = name
        else:
            root, bn = (pytorch, "bn") if scheme == "pytorch" else (kinetics, "batch3d")
            for theirs, ours in [("conv3d.weight", "conv3d.weight")] + [
                (f"{bn}.{norm}", f"bn.{norm}") for norm in norms
            ]:
                names[f"{root}.{theirs}"] = _Name(f"{pytorch}.{ours}", _as_it_is, _as_it_is)
    last, outer = "logits.conv3d", {"pytorch": "logits.conv3d", "kinetics": "conv3d_0c_1x1.conv3d"}
    if scheme == "tensorflow":
        root = f"{_TENSORFLOW_ROOT}Logits/Conv3d_0c_1x1/conv_3d"
        names[f"{root}/w"] = _Name(f"{last}.weight", _kernel_inward, _kernel_outward)
        names[f"{root}/b"] = _Name(f"{last}.bias", _as_it_is, _as_it_is)
    else:
        for part in ("weight", "bias"):
            names[f"{outer[scheme]}.{part}"] = _Name(f"{last}.{part}", _as_it_is, _as_it_is)
    return names


def scheme_of(weights: Mapping[str, Tensor]) -> str:
    """Return the scheme that most of the names belong to. Raises ``ValueError`` if none matches."""
    counts = {scheme: len(_names(scheme).keys() & weights.keys()) for scheme in SCHEMES}
    best = max(counts, key=lambda scheme: counts[scheme])
    if not counts[best]:
        raise ValueError(f"{next(iter(weights), 'nothing')!r}: is not a weight of I3D")
    return best


def to_pytorch(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of any scheme to the ``pytorch`` scheme.

    Raises ``ValueError`` naming an unexpected key; counters of batch norms are dropped.
    """
    weights = {name.removesuffix(":0"): value for name, value in weights.items()}
    names = _names(scheme := scheme_of(weights))
    pytorch: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(_COUNTER):
            continue
        if name not in names:
            raise ValueError(f"{name} is unexpected; I3D has no such weight (names by {scheme})")
        pytorch[names[name].pytorch] = names[name].inward(torch.as_tensor(value)).contiguous()
    if scheme == "tensorflow":
        for name in list(pytorch):
            if name.endswith("bn.bias"):  # gamma is 1
                pytorch[name.replace("bn.bias", "bn.weight")] = torch.ones_like(pytorch[name])
    return pytorch


def from_pytorch(weights: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """Convert weights of the ``pytorch`` scheme to another one.

    Raises ``ValueError`` for a scheme not in ``SCHEMES``, and for gammas other than 1 if the scheme
    has none.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r}: must be one of {', '.join(SCHEMES)}")
    if scheme == "tensorflow":
        for name, value in weights.items():
            if name.endswith("bn.weight") and not bool((value == 1).all()):
                raise ValueError(f"{name}: is not 1, and {scheme} has no gamma to hold it")
    return {theirs: name.outward(weights[name.pytorch]) for theirs, name in _names(scheme).items()}
