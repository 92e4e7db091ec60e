"""Keeps warnings about deliberate choices, and advertisements, out of what a command prints."""

from __future__ import annotations

import logging
import warnings

_MEANT_SO = (
    ".*does not have many workers.*",  # how many is data.reading.num_workers' business
    ".*LeafSpec.*",  # Lightning's own use of torch
    r".*module\(s\) in eval mode.*",  # the frozen tokenizer of a DiffusionSystem
    ".*already saved during checkpointing.*",  # a part's hyperparameters are its class_path
    ".*infer the batch indices.*",  # latents are keyed by clip
    ".*smaller than the logging interval.*",  # steps are counted here, not epochs
)


def quieten() -> None:
    """Filter the warnings of this process, and the tips among Lightning's messages."""
    for pattern in _MEANT_SO:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
