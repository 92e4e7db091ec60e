"""Clips of moving shapes with exact captions."""

from sora_lightning.data.synthetic.render import render, write_dataset
from sora_lightning.data.synthetic.simulated_captions import simulate_captions

__all__ = ["render", "simulate_captions", "write_dataset"]
