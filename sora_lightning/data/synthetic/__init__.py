"""Clips of moving shapes with exact captions."""

from sora_lightning.data.synthetic.render import render, write_dataset
from sora_lightning.data.synthetic.simulated_captions import hide_captions, simulate_captions

__all__ = ["hide_captions", "render", "simulate_captions", "write_dataset"]
