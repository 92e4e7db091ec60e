"""Clips of moving shapes with exact captions."""

from sora_lightning.data.synthetic.render import render, write_dataset

__all__ = ["render", "write_dataset"]
