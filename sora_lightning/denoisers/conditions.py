"""How a denoiser takes in its condition: text to attend to, and a vector that joins the time."""

from abc import ABC

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.types import Condition


class ConditionInput(nn.Module, ABC):
    """From a ``Condition`` to the network's width.

    ``text_every`` says that every so many blocks, from the first on, attend to the text; 0 is none.
    """

    text_every = 0

    def text(self, condition: Condition) -> Float[Tensor, "clips l d"] | None:
        """The text tokens, or ``None`` where no block attends to text."""
        return None

    def pooled(self, condition: Condition) -> Float[Tensor, "clips d"] | None:
        """What is added to the embedding of time, or ``None``."""
        return None


class TextAndPooled(ConditionInput):
    """Both projected; ``text_every`` = 2 leaves the text to the spatial blocks of the alternating
    layout.
    """

    def __init__(self, condition_width: int, width: int, text_every: int = 1):
        super().__init__()
        if text_every < 1:
            raise ValueError(f"text_every = {text_every} must be at least 1")
        self.text_every = text_every
        self.text_in = nn.Linear(condition_width, width)
        self.pooled_in = nn.Linear(condition_width, width)

    def text(self, condition: Condition) -> Float[Tensor, "clips l d"]:
        return self.text_in(condition.tokens)

    def pooled(self, condition: Condition) -> Float[Tensor, "clips d"]:
        return self.pooled_in(condition.pooled)


class TextOnly(ConditionInput):
    """Text through a two-layer perceptron, and nothing beside the time (PixArt, arXiv 2310.00426;
    Latte's text model).
    """

    def __init__(self, condition_width: int, width: int, text_every: int = 1):
        super().__init__()
        if text_every < 1:
            raise ValueError(f"text_every = {text_every} must be at least 1")
        self.text_every = text_every
        self.hidden = nn.Linear(condition_width, width)
        self.out = nn.Linear(width, width)

    def text(self, condition: Condition) -> Float[Tensor, "clips l d"]:
        return self.out(F.gelu(self.hidden(condition.tokens), approximate="tanh"))


class PooledOnly(ConditionInput):
    """The pooled vector as it is, say the embedding of a label: the class-conditional DiT."""

    def __init__(self, condition_width: int, width: int):
        super().__init__()
        if condition_width != width:
            raise ValueError(
                f"the conditioner's width {condition_width} is added to a network of width "
                f"{width}: they must be equal"
            )

    def pooled(self, condition: Condition) -> Float[Tensor, "clips d"]:
        return condition.pooled


class NoCondition(ConditionInput):
    """Time alone: unconditional models."""

    def __init__(self, condition_width: int, width: int):
        super().__init__()
