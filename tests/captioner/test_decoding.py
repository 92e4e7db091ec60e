"""Decoding finds what its definition says; the cache changes nothing but the time."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sora_lightning.captioner.bpe import BOS, EOS, PAD
from sora_lightning.captioner.decoding import Beam, Greedy, Nucleus
from tests.captioner.networks import clips, coca

SIZES = [(5, 16, 16), (3, 24, 16), (1, 16, 8), (5, 16, 16)]
VOCABULARY, LENGTH = 7, 4


def rngs(num, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(num)]


@dataclass(frozen=True)
class Chain:
    """Captions whose next token depends on the last one alone, by a table for each clip."""

    logits: Tensor
    ids: Tensor

    @property
    def room(self):
        return LENGTH + 1 - self.ids.shape[1]

    def next_logits(self):
        rows = torch.arange(len(self.ids))
        return self.logits[rows, self.ids[:, -1]], self

    def append(self, ids):
        return replace(self, ids=torch.cat([self.ids, ids[:, None]], dim=1))

    def select(self, rows):
        return Chain(self.logits[rows], self.ids[rows])


@pytest.fixture
def chain():
    rng = torch.Generator().manual_seed(3)
    return Chain(
        2 * torch.randn(5, VOCABULARY, VOCABULARY, generator=rng),
        torch.full((5, 1), BOS),
    )


def best_caption(logits, penalty):
    """The best of all captions, those that the room cuts among them."""
    text = [i for i in range(VOCABULARY) if i not in (PAD, BOS, 3, EOS)]
    allowed = torch.full((VOCABULARY,), -torch.inf)
    allowed[[*text, EOS]] = 0
    log_p = (logits + allowed).log_softmax(-1)
    ended = [(*c, EOS) for n in range(LENGTH) for c in itertools.product(text, repeat=n)]
    found = {}
    for caption in [*ended, *itertools.product(text, repeat=LENGTH)]:
        score = sum(log_p[a, b] for a, b in itertools.pairwise((BOS, *caption)))
        found[caption] = float(score) / len(caption) ** penalty
    return max(found, key=found.__getitem__)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_that_holds_every_caption_finds_the_best(chain, penalty):
    ids = Beam(num_beams=VOCABULARY**3, length_penalty=penalty)(chain, [])
    for row, logits in zip(ids.tolist(), chain.logits, strict=True):
        assert tuple(i for i in row if i != PAD) == best_caption(logits, penalty)


def test_a_beam_of_one_is_greedy(chain):
    greedy, beam = (decode(chain, []) for decode in (Greedy(), Beam(num_beams=1)))
    assert greedy.tolist() == beam.tolist()
    rows, last = torch.arange(5), torch.full((5,), BOS)
    allowed = chain.logits.clone()
    allowed[..., [PAD, BOS, 3]] = -torch.inf
    assert greedy[:, 0].tolist() == allowed[rows, last].argmax(-1).tolist()
    for row in greedy.tolist():
        assert PAD not in row[: row.index(EOS) + 1 if EOS in row else len(row)]
        assert set(row[row.index(EOS) + 1 :] if EOS in row else []) <= {PAD}


def test_a_nucleus_draws_its_members_by_their_probabilities(chain):
    many = replace(chain.select(torch.zeros(4000, dtype=torch.long)))
    ids = Nucleus(max_tokens=1, top_p=0.8)(many, rngs(4000))[:, 0]
    logits = chain.logits[0, BOS].clone()
    logits[[PAD, BOS, 3]] = -torch.inf
    shares, order = logits.softmax(-1).sort(descending=True)
    num = int((shares.cumsum(0) < 0.8).sum()) + 1  # the fewest that reach 0.8
    assert 1 < num < 4
    drawn = torch.bincount(ids, minlength=VOCABULARY)[order] / len(ids)
    torch.testing.assert_close(drawn[:num], shares[:num] / shares[:num].sum(), atol=0.03, rtol=0)
    assert drawn[num:].sum() == 0


def test_a_draw_depends_on_the_clips_own_generator_alone(chain):
    together = Nucleus()(chain, rngs(5))
    alone = Nucleus()(chain.select(torch.tensor([3])), rngs(1, seed=3))
    assert alone[0].tolist() == together[3, : alone.shape[1]].tolist()
    cold = Nucleus(temperature=1e-4)(chain, rngs(5))
    assert cold.tolist() == Greedy()(chain, []).tolist()


@pytest.mark.parametrize("decoding", [Greedy(16), Beam(16, num_beams=3), Nucleus(16, top_p=0.99)])
@pytest.mark.parametrize("num_queries", [3, None])
def test_a_cache_changes_nothing(decoding, num_queries):
    model = coca(num_queries=num_queries)
    with torch.no_grad():
        cached = model.start(clips(*SIZES))
        whole = replace(cached, cache=None)
        ids, same = decoding(cached, rngs(4)), decoding(whole, rngs(4))
        assert ids.shape[1] > 8
        assert ids.tolist() == same.tolist()
        for token in ids.T.clamp(min=4):
            logits, cached = cached.append(token).next_logits()
            expected, whole = whole.append(token).next_logits()
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert cached.cache.num_tokens == ids.shape[1] + 1
        assert whole.cache is None


@pytest.mark.parametrize("num_queries", [3, None])
def test_a_batch_of_mixed_sizes_is_captioned_as_its_clips_alone(num_queries):
    model, videos = coca(num_queries=num_queries), clips(*SIZES)
    with torch.no_grad():
        together = model.captions(videos, Nucleus(max_tokens=12), rngs(4))
        alone = [
            model.captions(video[None], Nucleus(max_tokens=12), rngs(1, seed=i))[0]
            for i, video in enumerate(videos)
        ]
    assert together == alone
    assert len({caption for (caption,) in together}) > 1


def test_several_captions_of_a_clip_are_drawn_from_its_own_generator():
    model, videos = coca(), clips(*SIZES)
    with torch.no_grad():
        together = model.captions(videos, Nucleus(max_tokens=12), rngs(4), num_captions=3)
        alone = model.captions(videos[1][None], Nucleus(max_tokens=12), rngs(1, seed=1), 3)
        greedy = model.captions(videos, Greedy(max_tokens=12), rngs(4), num_captions=2)
    assert together[1:2] == alone
    assert all(len(one) == 3 and len(set(one)) > 1 for one in together)
    assert all(first == second for first, second in greedy)


@pytest.mark.parametrize("temperature", [1.0, 0.01])  # different ones, and repeated ones
def test_of_the_candidates_those_nearest_to_the_clip_are_kept(temperature):
    model, videos = coca(), clips(*SIZES)
    drawing = {"max_tokens": 12, "temperature": temperature}
    with torch.no_grad():
        kept = model.captions(videos, Nucleus(**drawing, num_candidates=4), rngs(4), 3)
        for index, video in enumerate(videos):
            state = model.start(video[None]).select(torch.zeros(12, dtype=torch.long))
            ids = Nucleus(**drawing)(state, rngs(1, seed=index) * 12)
            cls = model.tower(torch.cat([torch.full((12, 1), BOS), ids], dim=1))[1]
            texts = torch.nn.functional.normalize(model.text_out(cls), dim=-1)
            nearest = (texts @ model.embed_videos(video[None])[0]).argsort(descending=True)
            in_order = [tuple(ids[i].tolist()) for i in nearest]
            distinct = list(dict.fromkeys(in_order))
            assert (len(distinct) < 3) == (temperature < 1)
            expected = model.bpe.decode(torch.tensor(distinct[:3]))
            assert kept[index][: len(expected)] == expected
            assert set(kept[index]) == set(expected)


def test_the_context_bounds_a_caption():
    model = coca(context=8)
    with torch.no_grad():
        assert Greedy()(model.start(clips((5, 16, 16))), []).shape[1] <= 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Greedy(max_tokens=0), "max_tokens = 0"),
        (lambda: Nucleus(top_p=0.0), r"top_p = 0.0: must lie in \(0, 1\]"),
        (lambda: Nucleus(temperature=0.0), "temperature = 0.0"),
        (lambda: Nucleus(num_candidates=0), "num_candidates = 0"),
        (lambda: Beam(num_beams=0), "num_beams = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    written = "Nucleus(max_tokens=8, top_p=0.5, temperature=1.0, num_candidates=1)"
    assert str(Nucleus(8, top_p=0.5)) == written
