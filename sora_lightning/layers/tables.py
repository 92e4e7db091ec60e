"""Learned tables: parameters of several axes that are not weight matrices."""

from typing import ClassVar


class HasTables:
    """Marks a module whose parameters ``table_names`` are tables, such as learned positions.

    The rows of a table are independent, as those of an ``nn.Embedding`` are. Optimizers neither
    decay nor orthogonalise them.
    """

    table_names: ClassVar[tuple[str, ...]]
