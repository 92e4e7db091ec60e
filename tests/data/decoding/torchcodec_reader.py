"""The torchcodec reader as a parameter of a test: skipped, with the reason, where it does not
load."""

from __future__ import annotations

import pytest
from _pytest.mark.structures import ParameterSet

from sora_lightning.data.decoding.torchcodec_reader import TorchCodecReader


def torchcodec_parameter() -> ParameterSet:
    try:
        return pytest.param(TorchCodecReader(), id="torchcodec")
    except ValueError as error:
        return pytest.param(None, id="torchcodec", marks=pytest.mark.skip(reason=str(error)))
