"""Rows of numbers, one for each evaluated video, gathered over ranks: the state behind every metric
here.

A row is known by the id of its video. Ranks may hold any number of rows, none included, and may
hold the same video twice, as padded samplers do: ``rows()`` returns each id once, in order, so that
a score does not depend on how the work was shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class RowBank(Metric):
    """A metric whose states are banks of float64 rows, each headed by the id of its video.

    ``banks`` names the states and gives the number of columns of each.
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
        # A rank without rows still joins the gathering with a tensor of the right width and type.
        for name, columns in self.banks.items():
            getattr(self, name).append(
                torch.zeros(0, 1 + columns, dtype=torch.float64, device=self.device)
            )

    def reset(self) -> None:
        super().reset()
        self._open_banks()

    def add(self, bank: str, ids: Sequence[int], rows: Float[Tensor, "b columns"]) -> None:
        """Note one row for each id. Raises ``ValueError`` when numbers of ids, rows or columns
        differ.
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
        """Each video's row once, ordered by id."""
        table = dim_zero_cat(getattr(self, bank))
        _, first = torch.unique(table[:, 0], return_inverse=True)
        order = torch.argsort(first, stable=True)
        fresh = torch.ones(len(order), dtype=torch.bool, device=table.device)
        fresh[1:] = first[order][1:] != first[order][:-1]
        return table[order[fresh]][:, 1:]
