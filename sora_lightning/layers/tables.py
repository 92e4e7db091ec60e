"""Learned tables: parameters of several axes that are no weight matrices."""

from typing import ClassVar


class HasTables:
    """A module whose parameters ``table_names`` are tables, as positions are.

    A row of a table stands by itself, as that of an ``nn.Embedding``: optimizers neither decay nor
    orthogonalise it.
    """

    table_names: ClassVar[tuple[str, ...]]
