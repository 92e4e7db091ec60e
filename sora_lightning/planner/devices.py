"""Accelerators: peak throughput and memory, as their vendors state them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Dense bfloat16 peak in FLOP/s, memory in bytes, and the vendor's page that states both."""

    name: str
    bf16_flops: float
    memory: float
    source: str


DEVICES = {
    device.name: device
    for device in (
        Device("RTX4090", 165.2e12, 24e9, "NVIDIA Ada GPU Architecture, appendix A: dense"),
        Device("L40S", 362.05e12, 48e9, "NVIDIA L40S data sheet, without sparsity"),
        Device("A100-40GB", 312e12, 40e9, "NVIDIA A100 data sheet"),
        Device("A100", 312e12, 80e9, "NVIDIA A100 data sheet"),
        Device("H100", 989e12, 80e9, "NVIDIA H100 data sheet, SXM, without sparsity"),
        Device("H200", 989e12, 141e9, "NVIDIA H200 data sheet, SXM, without sparsity"),
        Device("TPUv3", 123e12, 32e9, "Google Cloud TPU v3, one chip of two cores"),
    )
}


def device_named(name: str) -> Device:
    """Return a row of ``DEVICES``. Raises ``ValueError`` for a name that is not in the table."""
    if name not in DEVICES:
        raise ValueError(f"device = {name!r}: the devices are {', '.join(DEVICES)}")
    return DEVICES[name]
