"""Shifts, scales and gates of adaptive layer norm, in three parametrisations."""

from abc import ABC, abstractmethod

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.checks import require_at_least
from sora_lightning.denoisers.conditioning_embedding import ConditioningEmbedding


def zero_init(linear: nn.Linear) -> None:
    """Set weight and bias of a projection to zero."""
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class Modulation(nn.Module, ABC):
    """Computes ``num_parts`` vectors of ``width`` from each row of ``c``. They are zero at first.

    If ``is_shared``, all blocks start from the modulation in ``c.shared``.
    """

    is_shared = False

    @abstractmethod
    def forward(self, c: ConditioningEmbedding) -> Float[Tensor, "r p"]: ...

    @abstractmethod
    def zero_init(self) -> None:
        """Make every vector zero."""

    @classmethod
    def for_final_layer(cls, width: int, num_parts: int) -> "Modulation":
        """Return the modulation of a final layer that follows blocks of this kind."""
        return AdaLN(width, num_parts)


class AdaLN(Modulation):
    """One projection for each block (DiT, arXiv 2212.09748, section 3.2)."""

    def __init__(self, width: int, num_parts: int):
        super().__init__()
        self.linear = nn.Linear(width, num_parts * width)

    def forward(self, c: ConditioningEmbedding) -> Float[Tensor, "r p"]:
        return self.linear(c.activated)

    def zero_init(self) -> None:
        zero_init(self.linear)


class AdaLNLoRA(Modulation):
    """One projection for all blocks plus one of low ``rank`` for each (W.A.L.T, arXiv 2312.06662,
    section 3.3, equation 6).
    """

    is_shared = True

    def __init__(self, width: int, num_parts: int, rank: int = 2):
        super().__init__()
        require_at_least(1, rank=rank)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, num_parts * width, bias=False)

    def forward(self, c: ConditioningEmbedding) -> Float[Tensor, "r p"]:
        assert c.shared is not None
        return c.shared + self.up(self.down(c.activated))

    def zero_init(self) -> None:
        zero_init(self.up)


class AdaLNTable(Modulation):
    """One projection for all blocks plus a learned offset for each: "adaLN-single" (PixArt, arXiv
    2310.00426, section 2.3).
    """

    is_shared = True

    def __init__(self, width: int, num_parts: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_parts, width))

    def forward(self, c: ConditioningEmbedding) -> Float[Tensor, "r p"]:
        assert c.shared is not None
        return c.shared + rearrange(self.table, "part d -> (part d)")

    def zero_init(self) -> None:
        nn.init.zeros_(self.table)

    @classmethod
    def for_final_layer(cls, width: int, num_parts: int) -> Modulation:
        return TiledTable(width, num_parts)


class TiledTable(Modulation):
    """The embedding repeated for each part plus a learned offset: PixArt's final layer."""

    def __init__(self, width: int, num_parts: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_parts, width))

    def forward(self, c: ConditioningEmbedding) -> Float[Tensor, "r p"]:
        parts = c.embedding[:, None] + self.table
        return rearrange(parts, "r part d -> r (part d)")

    def zero_init(self) -> None:
        nn.init.zeros_(self.table)
