"""The sizes of DiTs by name."""

from sora_lightning.layers.transformer import TransformerSize

SIZES = {
    "tiny": TransformerSize(4, 128, 4),  # the demo's
    "S": TransformerSize(12, 384, 6),  # S to XL: DiT, arXiv 2212.09748, table 1
    "B": TransformerSize(12, 768, 12),
    "L": TransformerSize(24, 1024, 16),
    "XL": TransformerSize(28, 1152, 16),
    # 12 d^2 L = 3.31 B, as W.A.L.T's largest, arXiv 2312.06662
    "3B": TransformerSize(52, 2304, 18),
}


def named_size(size: TransformerSize | str) -> TransformerSize:
    """Return a size as it is, or the row of ``SIZES`` of this name.

    Raises ``ValueError`` for a name that is not in the table.
    """
    if isinstance(size, TransformerSize):
        return size
    if size not in SIZES:
        raise ValueError(f"size = {size!r}: the sizes are {', '.join(SIZES)}")
    return SIZES[size]
