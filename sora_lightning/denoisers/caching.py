"""Feature caching: most sampling steps skip the middle blocks of a network and add what they added
at an earlier step (Delta-DiT, arXiv 2406.01125; FORA, arXiv 2407.01425).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_at_least
from sora_lightning.denoisers.conditioning_embedding import BlockContext
from sora_lightning.denoisers.dit import DiT
from sora_lightning.types import Condition

Tokens = Float[Tensor, "b n d"]


@dataclass(frozen=True)
class FeatureCaching:
    """Compute the middle blocks at some of a sampler's steps only. The blocks around them see the
    new noise and the new time.

    Args:
        interval: The middle blocks are computed at every ``interval``-th step; 1 computes all.
        first: Blocks before the middle ones, which are computed at every step.
        last: Blocks after them.
    """

    interval: int = 1
    first: int = 1
    last: int = 1

    def __post_init__(self) -> None:
        require_at_least(1, where="cache.", interval=self.interval)
        require_at_least(0, where="cache.", first=self.first, last=self.last)

    def around(self, denoiser: object) -> CachedDenoiser:
        """Return the cached denoiser for one sampling run.

        Raises ``ValueError`` for a network that is no ``DiT`` or has no blocks left to cache.
        """
        if not isinstance(denoiser, DiT):
            raise ValueError(f"a cache of features is for a DiT, not {type(denoiser).__name__}")
        if self.first + self.last >= len(denoiser.blocks):
            raise ValueError(
                f"first = {self.first}, last = {self.last} of the cache leave none of the "
                f"{len(denoiser.blocks)} blocks between them"
            )
        return CachedDenoiser(denoiser, self)


@dataclass
class CachedDenoiser:
    """A ``DenoiserFunction`` that runs a ``DiT`` with cached middle blocks, for one sampling run.

    Guidance goes around it. A new time begins a new step of the sampler. If guidance calls several
    times in a step, each call has a cache of its own.
    """

    denoiser: DiT
    caching: FeatureCaching
    num_computed: int = 0
    num_reused: int = 0
    _step: int = -1
    _time: float | None = None
    _call: int = 0
    _added: dict[int, Tokens] = field(default_factory=dict)

    def __call__(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *n"],
        condition: Condition,
        estimate: Float[Tensor, "b c f h w"] | None = None,
    ) -> Float[Tensor, "b out f h w"]:
        self._count(float(t.max()))  # known tokens have smaller times than the sampler's
        first, last = self.caching.first, len(self.denoiser.blocks) - self.caching.last
        x, context = self.denoiser.embed(x_t, t, condition, estimate)  # b n d
        x = self.denoiser.run_blocks(x, context, slice(first))
        x = self._run_middle(x, context, slice(first, last))
        x = self.denoiser.run_blocks(x, context, slice(last, None))
        prediction = self.denoiser.to_latents(x, context, x_t)
        assert isinstance(prediction, Tensor)
        return prediction

    def _count(self, time: float) -> None:
        """Count the steps by their times, and the calls of a step."""
        new = time != self._time
        self._step, self._call = (self._step + 1, 0) if new else (self._step, self._call + 1)
        self._time = time

    def _run_middle(self, x: Tokens, context: BlockContext, middle: slice) -> Tokens:
        added = self._added.get(self._call)
        # Guidance that begins or ends between two steps changes the number of clips in a call.
        if added is not None and added.shape != x.shape:
            added = None
        if self._step % self.caching.interval and added is not None:
            self.num_reused += 1
            return x + added
        self.num_computed += 1
        y = self.denoiser.run_blocks(x, context, middle)
        self._added[self._call] = y - x
        return y
