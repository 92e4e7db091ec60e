"""Search for a caption in the distribution of a captioner: greedy, beam and nucleus."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from sora_lightning.captioner.bpe import EOS, NUM_SPECIAL, PAD
from sora_lightning.checks import require_at_least, require_in, require_positive

State = TypeVar("State", bound="DecodingState")


class DecodingState(Protocol):
    """Captions so far. ``room`` is the number of tokens that each can still take."""

    @property
    def ids(self) -> Int[Tensor, "b l"]: ...
    @property
    def room(self) -> int: ...
    def next_logits(self: State) -> tuple[Float[Tensor, "b v"], State]: ...
    def append(self: State, ids: Int[Tensor, " b"]) -> State: ...
    def select(self: State, rows: Int[Tensor, " r"]) -> State: ...


@dataclass(frozen=True)
class Decoding(ABC):
    """A way to choose the tokens of captions, at most ``max_tokens`` and the context's room.

    ``str`` names the settings, as a manifest records them.
    """

    max_tokens: int = 64
    num_candidates = 1  # captions that are computed for each that is asked for

    def __post_init__(self) -> None:
        require_at_least(1, max_tokens=self.max_tokens)

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in asdict(self).items())
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def __call__(self, state: DecodingState, rngs: Sequence[torch.Generator]) -> Int[Tensor, "b l"]:
        """Return the tokens after ``state.ids``: text, ``EOS`` where it ended, then ``PAD``.

        ``rngs`` has a generator for each clip.
        """


@dataclass(frozen=True)
class Greedy(Decoding):
    """The most probable token, each time."""

    def __call__(self, state: DecodingState, rngs: Sequence[torch.Generator]) -> Int[Tensor, "b l"]:
        return _token_by_token(state, self.max_tokens, lambda logits: logits.argmax(-1))


@dataclass(frozen=True)
class Nucleus(Decoding):
    """A token drawn from the fewest most probable ones whose probabilities reach ``top_p`` (arXiv
    1904.09751, section 3.1), after dividing the logits by ``temperature``.

    ``num_candidates`` captions are drawn for each that is asked for, and those are kept whose
    contrastive embeddings are nearest to the clip's.
    """

    top_p: float = 0.9
    temperature: float = 1.0
    num_candidates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in("(0, 1]", top_p=self.top_p)
        require_positive(temperature=self.temperature)
        require_at_least(1, num_candidates=self.num_candidates)

    def __call__(self, state: DecodingState, rngs: Sequence[torch.Generator]) -> Int[Tensor, "b l"]:
        def draw(logits: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
            shares, order = (logits / self.temperature).softmax(-1).sort(-1, descending=True)
            shares = shares * (shares.cumsum(-1) - shares < self.top_p)
            ends = shares.cumsum(-1)
            uniforms = torch.cat([torch.rand(1, generator=r, device=r.device) for r in rngs])
            place = torch.searchsorted(ends, uniforms[:, None].to(ends) * ends[:, -1:], right=True)
            return order.gather(1, place.clamp(max=order.shape[1] - 1))[:, 0]

        return _token_by_token(state, self.max_tokens, draw)


@dataclass(frozen=True)
class Beam(Decoding):
    """The ``num_beams`` most probable prefixes, each time; at the end the one of the largest mean
    log-probability, ``sum / length**length_penalty``.
    """

    num_beams: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, num_beams=self.num_beams)

    def __call__(self, state: DecodingState, rngs: Sequence[torch.Generator]) -> Int[Tensor, "b l"]:
        b, start = state.ids.shape
        device, k = state.ids.device, self.num_beams
        clips = torch.arange(b, device=device)
        state = state.select(repeat(clips, "b -> (b k)", k=k))
        # Equal beams at first: all but one are impossible.
        scores = torch.full((b, k), -torch.inf, device=device)
        scores[:, 0] = 0
        ended = torch.zeros(b, k, dtype=torch.bool, device=device)
        for _ in range(min(self.max_tokens, state.room)):
            logits, state = state.next_logits()
            log_p = _text_only(logits).log_softmax(-1)
            log_p[ended.flatten()] = _only(PAD, log_p)  # an ended caption stays as it is
            totals = rearrange(scores, "b k -> b k 1") + rearrange(log_p, "(b k) v -> b k v", k=k)
            scores, places = totals.flatten(1).topk(k)
            beams, tokens = places // log_p.shape[1], places % log_p.shape[1]
            state = state.select((clips[:, None] * k + beams).flatten()).append(tokens.flatten())
            ended = ended.gather(1, beams) | (tokens == EOS)
            if ended.all():
                break
        ids = rearrange(state.ids[:, start:], "(b k) l -> b k l", k=k)
        lengths = (ids != PAD).sum(-1)
        best = (scores / lengths**self.length_penalty).argmax(1)
        return ids[clips, best]


def _token_by_token(
    state: DecodingState, max_tokens: int, choose: Callable[[Tensor], Tensor]
) -> Int[Tensor, "b l"]:
    start = state.ids.shape[1]
    ended = torch.zeros(len(state.ids), dtype=torch.bool, device=state.ids.device)
    for _ in range(min(max_tokens, state.room)):
        logits, state = state.next_logits()
        ids = choose(_text_only(logits)).masked_fill(ended, PAD)
        state, ended = state.append(ids), ended | (ids == EOS)
        if ended.all():
            break
    return state.ids[:, start:]


def _text_only(logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """Return logits that leave text and ``EOS`` possible, no other marks."""
    marks = [i for i in range(NUM_SPECIAL) if i != EOS]
    return logits.index_fill(1, torch.tensor(marks, device=logits.device), -torch.inf)


def _only(token: int, like: Float[Tensor, "b v"]) -> Float[Tensor, " v"]:
    log_p = like.new_full((like.shape[1],), -torch.inf)
    log_p[token] = 0
    return log_p
