"""Fingerprints of networks, by which files name the model that made them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def fingerprint(module: nn.Module, *facts: str) -> str:
    """Return the SHA-256 of a network's class, of ``facts`` and of its state, in that order.

    It is zero for a network on the meta device, which has no values.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return bytes(32).hex()
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for fact in facts:
        digest.update(fact.encode())
    for name, state in sorted(module.state_dict().items()):
        if not isinstance(state, Tensor):
            digest.update(f"{name} {state}".encode())
            continue
        digest.update(f"{name} {tuple(state.shape)} {state.dtype}".encode())
        flat = state.detach().cpu().flatten().contiguous()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
