"""How a denoiser takes its condition: text tokens to attend to, and a vector added to the time."""

from abc import ABC

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.checks import require_at_least
from sora_lightning.types import Condition


class ConditionInput(nn.Module, ABC):
    """Projects a ``Condition`` to the network's width.

    Every ``text_every``-th block, from the first on, attends to the text; 0 is none.
    """

    text_every = 0

    def require_text(self) -> None:
        """Raise ``ValueError`` if no block attends to text, and so none to an image's tokens."""
        if not self.text_every:
            raise ValueError(
                f"image_encoder is set, and the denoiser's {type(self).__name__} has no block "
                "attend to tokens: nothing would be seen of the image's"
            )

    def text(self, condition: Condition) -> Float[Tensor, "clips l d"] | None:
        """Return the text tokens, or ``None`` if no block attends to text."""
        return None

    def pooled(self, condition: Condition) -> Float[Tensor, "clips d"] | None:
        """Return the vector that is added to the embedding of time, or ``None``."""
        return None


class TextAndPooled(ConditionInput):
    """Project text tokens and pooled vector.

    With ``text_every`` = 2 only the spatial blocks of the alternating layout attend to text.
    """

    def __init__(self, condition_width: int, width: int, text_every: int = 1):
        super().__init__()
        require_at_least(1, text_every=text_every)
        self.text_every = text_every
        self.text_in = nn.Linear(condition_width, width)
        self.pooled_in = nn.Linear(condition_width, width)

    def text(self, condition: Condition) -> Float[Tensor, "clips l d"]:
        return self.text_in(condition.tokens)

    def pooled(self, condition: Condition) -> Float[Tensor, "clips d"]:
        return self.pooled_in(condition.pooled)


class TextOnly(ConditionInput):
    """Project text tokens by a two-layer perceptron, without a pooled vector (PixArt, arXiv
    2310.00426; Latte's text model).
    """

    def __init__(self, condition_width: int, width: int, text_every: int = 1):
        super().__init__()
        require_at_least(1, text_every=text_every)
        self.text_every = text_every
        self.hidden = nn.Linear(condition_width, width)
        self.out = nn.Linear(width, width)

    def text(self, condition: Condition) -> Float[Tensor, "clips l d"]:
        return self.out(F.gelu(self.hidden(condition.tokens), approximate="tanh"))


class PooledOnly(ConditionInput):
    """Take the pooled vector unchanged, such as a label's embedding (class-conditional DiT)."""

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
    """Take nothing: unconditional models."""

    def __init__(self, condition_width: int, width: int):
        super().__init__()
