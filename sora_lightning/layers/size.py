"""How large a transformer is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerSize:
    """Depth in blocks, width in channels, heads of an attention."""

    depth: int
    width: int
    num_heads: int
