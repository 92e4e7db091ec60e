import pytest
import torch

from sora_lightning.captioner import EdgeStream, MotionStream
from sora_lightning.captioner.bpe import EOS, PAD
from sora_lightning.captioner.coca import contrastive_losses
from sora_lightning.captioner.text import caption_losses
from sora_lightning.layers.partitions import Alternating, FactorisedSelfAttention, Joint, Windows
from tests.captioner.networks import CAPTIONS, clips, coca

LAYOUTS = [Joint(), Alternating(), FactorisedSelfAttention(), Windows([[1, 2, 2], [3, 1, 1]])]
SIZES = [(5, 16, 16), (3, 24, 16), (5, 16, 16), (1, 16, 8)]


@pytest.mark.parametrize("num_queries", [3, None])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_a_pack_of_mixed_sizes_equals_each_clip_alone(layout, num_queries):
    streams = [EdgeStream([4, 8]), MotionStream([4])]
    model, videos = coca(layout=layout, streams=streams, num_queries=num_queries), clips(*SIZES)
    packed = model(videos, CAPTIONS)
    for i, video in enumerate(videos):
        alone = model(video[None], CAPTIONS[i : i + 1])
        for together, single in zip(packed, alone, strict=True):
            torch.testing.assert_close(together[i : i + 1], single, rtol=1e-4, atol=1e-5)
    embedded = model.embed_videos(videos)
    torch.testing.assert_close(embedded, packed.video)
    assert (embedded @ embedded.T).triu(1).max() < 0.999  # the clips are told apart
    torch.testing.assert_close(model.embed_captions(CAPTIONS), packed.text)


def test_the_decoder_attends_to_all_tokens_without_queries():
    model, videos = coca(num_queries=None), clips(*SIZES)
    context, mask = model.caption_context(*model.encoder(videos))
    assert mask.sum(1).tolist() == [3 * 4, 2 * 6, 3 * 4, 1 * 2]
    captions = CAPTIONS[:1] * len(SIZES)
    for row, column in mask.nonzero()[[0, 11, 12, -1]].tolist():  # each moves its clip's loss alone
        changed = context.clone()
        changed[row, column] += 1
        moved = _losses(model, changed, mask, captions) - _losses(model, context, mask, captions)
        assert moved.abs().gt(1e-6).nonzero().flatten().tolist() == [row]


def _losses(model, context, mask, captions):
    ids = model.bpe.encode(captions)
    logits, _ = model.decoder(model.tower(ids)[0][:, :-1], model.decoder.videos(context, mask), [])
    return caption_losses(logits, ids[:, 1:])[0]


def test_dropped_tokens_are_not_seen():
    model, (video, other) = coca(), clips((5, 16, 16), (5, 16, 16))
    kept = [torch.tensor([0, 1, 2, 3])]  # the first tubelet of frames: the first frame alone
    tokens, sequence = model.encoder([video], kept)
    assert tokens.shape[1] == 4
    changed = torch.cat([video[:, :1], other[:, 1:]], dim=1)
    pooled, _ = model.embedding_pooler(tokens, sequence)
    torch.testing.assert_close(pooled, model.embedding_pooler(*model.encoder([changed], kept))[0])
    assert not torch.allclose(pooled, model.embedding_pooler(*model.encoder([video]))[0])


def test_the_tower_is_causal_and_cls_sees_everything():
    model = coca()
    ids = model.bpe.encode(CAPTIONS[:1])
    changed = ids.clone()
    changed[0, 4] = ids[0, 3]
    (tokens, cls), (tokens_2, cls_2) = model.tower(ids), model.tower(changed)
    torch.testing.assert_close(tokens[:, :4], tokens_2[:, :4])
    assert not torch.allclose(tokens[:, 4], tokens_2[:, 4])
    assert not torch.allclose(cls, cls_2)


def test_padding_changes_nothing():
    model = coca()
    ids = model.bpe.encode(["up"])
    padded = torch.nn.functional.pad(ids, (0, 5), value=PAD)
    (tokens, cls), (tokens_2, cls_2) = model.tower(ids), model.tower(padded)
    torch.testing.assert_close(tokens, tokens_2[:, : ids.shape[1]])
    torch.testing.assert_close(cls, cls_2)


def test_the_caption_loss_is_the_mean_over_real_tokens():
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[4, 3, EOS], [4, EOS, PAD]])
    losses, _ = caption_losses(logits, targets)
    log_p = logits.log_softmax(-1)
    expected = -(log_p[1, 0, 4] + log_p[1, 1, EOS]) / 2
    torch.testing.assert_close(losses[1], expected)
    certain = torch.nn.functional.one_hot(targets, 5).float() * 99
    certain[1, 2] = 0
    assert caption_losses(certain, targets)[1].tolist() == [1, 1]
    certain[0, 0, 0] = 999
    torch.testing.assert_close(caption_losses(certain, targets)[1], torch.tensor([2 / 3, 1]))


def test_the_contrastive_loss_is_cocas_where_captions_differ():
    x, y = (torch.nn.functional.normalize(torch.randn(3, 4), dim=-1) for _ in range(2))
    scale = torch.tensor(7.0)
    losses = contrastive_losses(x, y, torch.eye(3, dtype=torch.bool), scale)
    similarity = (scale * x @ y.T).exp()
    own = similarity.diagonal()
    expected = -(own / similarity.sum(1)).log() - (own / similarity.sum(0)).log()
    torch.testing.assert_close(losses, expected)


def test_clips_of_one_caption_do_not_repel_each_other():
    x = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), dim=-1)
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    scale = torch.tensor(100.0)
    torch.testing.assert_close(
        contrastive_losses(x, x, same, scale)[:2], torch.full((2,), 2 * torch.tensor(2.0).log())
    )  # no less is possible: half of the probability for each of the two


def test_a_caption_beyond_the_context_and_a_wrong_size_are_refused():
    model = coca(context=8)
    with pytest.raises(ValueError, match="context = 8 is the largest"):
        model.embed_captions(CAPTIONS)
    with pytest.raises(ValueError, match="no multiple of 8"):
        model.embed_videos(clips((5, 16, 12)))
