"""Metric state with one row of numbers for each video, gathered over ranks.

Rows are identified by the id of their video. Ranks may hold different numbers of rows, including
none, and may hold the same video twice, as with padded samplers. ``rows()`` returns each id once,
in order, so a score does not depend on how videos are distributed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class RowBank(Metric):
    """Metric whose states hold float64 rows, each preceded by the id of its video.

    ``banks`` maps the names of the states to their numbers of columns.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, banks: dict[str, int]) -> None:
        super().__init__()
        self.banks = banks
        for name in banks:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._open_banks()

    def _open_banks(self) -> None:
        # A rank without rows gathers an empty tensor of the right width and type.
        for name, columns in self.banks.items():
            getattr(self, name).append(
                torch.zeros(0, 1 + columns, dtype=torch.float64, device=self.device)
            )

    def reset(self) -> None:
        super().reset()
        self._open_banks()

    def add(self, bank: str, ids: Sequence[int], rows: Float[Tensor, "b columns"]) -> None:
        """Add one row for each id.

        Raises ``ValueError`` if the numbers of ids, rows or columns differ.
        """
        if rows.shape != (len(ids), self.banks[bank]):
            raise ValueError(
                f"{bank}: rows of shape {tuple(rows.shape)} for {len(ids)} ids: "
                f"must be ({len(ids)}, {self.banks[bank]})"
            )
        heads = torch.as_tensor(list(ids), dtype=torch.float64, device=self.device)[:, None]
        rows = rows.detach().to(self.device, torch.float64)
        getattr(self, bank).append(torch.cat([heads, rows], dim=1))

    def rows(self, bank: str) -> Float[Tensor, "n columns"]:
        """Return the row of each video once, sorted by id."""
        table = dim_zero_cat(getattr(self, bank))
        _, first = torch.unique(table[:, 0], return_inverse=True)
        order = torch.argsort(first, stable=True)
        fresh = torch.ones(len(order), dtype=torch.bool, device=table.device)
        fresh[1:] = first[order][1:] != first[order][:-1]
        return table[order[fresh]][:, 1:]
