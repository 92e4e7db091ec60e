"""Cost of a model before it trains: tokens, FLOPs, memory, GPU-hours and price."""

from sora_lightning.planner.counting import Count, count
from sora_lightning.planner.devices import DEVICES, Device, device_named
from sora_lightning.planner.estimates import Parallelism, Workload, estimate

__all__ = [
    "DEVICES",
    "Count",
    "Device",
    "Parallelism",
    "Workload",
    "count",
    "device_named",
    "estimate",
]
