"""Feature caching while sampling: at most steps the middle blocks of a network are not computed,
and what they added at an earlier step is added again (Delta-DiT, arXiv 2406.01125; FORA, arXiv
2407.01425).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from sora_lightning.denoisers.dit import DiT
from sora_lightning.types import Condition

Tokens = Float[Tensor, "b n d"]


@dataclass(frozen=True)
class FeatureCaching:
    """The middle blocks are computed at every ``interval``-th step of a sampler; 1 computes all.

    ``first`` blocks at the beginning and ``last`` at the end are computed at every step: they see
    the new noise and the new time.
    """

    interval: int = 1
    first: int = 1
    last: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval = {self.interval} of the cache: must be at least 1")
        if min(self.first, self.last) < 0:
            raise ValueError(
                f"first = {self.first}, last = {self.last} of the cache: must not be negative"
            )

    def around(self, denoiser: object) -> CachedDenoiser:
        """The denoiser for one sampling run. ``ValueError`` for a network that is no ``DiT`` or has
        no blocks left to cache.
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
    """A ``DiT`` as a ``DenoiserFunction`` that remembers; it serves one sampling run.

    Guidance goes around it. A sampler's step is known by its time; where guidance calls several
    times at one step, each call has a memory of its own.
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
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b out f h w"]:
        # Known tokens stand before the others: the largest time is that of the sampler.
        time = float(t.max())
        new = time != self._time
        self._step, self._call = (self._step + 1, 0) if new else (self._step, self._call + 1)
        self._time = time
        return self.denoiser(x_t, t, condition, middle=self)

    @property
    def blocks(self) -> slice:
        """Which blocks are in the middle."""
        return slice(self.caching.first, len(self.denoiser.blocks) - self.caching.last)

    def run(self, x: Tokens, compute: Callable[[Tokens], Tokens]) -> Tokens:
        """The tokens after the middle blocks, which ``compute`` runs."""
        added = self._added.get(self._call)
        # Guidance that begins or ends between two steps changes the number of clips in a call.
        if added is not None and added.shape != x.shape:
            added = None
        if self._step % self.caching.interval and added is not None:
            self.num_reused += 1
            return x + added
        self.num_computed += 1
        y = compute(x)
        self._added[self._call] = y - x
        return y
