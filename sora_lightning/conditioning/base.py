"""What every conditioner keeps to: a batch's captions in, the denoiser's condition out."""

from abc import ABC, abstractmethod

from jaxtyping import Bool
from torch import Tensor, nn

from sora_lightning.types import Condition


class Conditioner(nn.Module, ABC):
    """Turns captions into a ``Condition`` of this ``width``; knows what "no condition" looks
    like.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    @abstractmethod
    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """The condition of each caption; where ``drop`` is True it is the one of no caption at
        all.
        """

    def null(self, num_clips: int) -> Condition:
        """The condition of no caption: the other end of classifier-free guidance."""
        return self([""] * num_clips)
