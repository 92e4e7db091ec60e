"""Hashes of what determines scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def fingerprint(record: dict[str, Any]) -> str:
    """Return the sha256 of a record's canonical JSON: sorted keys, no spaces, no NaN."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def texts_sha256(texts: Sequence[str]) -> str:
    """Return the sha256 of a list of texts. The order matters."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
