import torch

from sora_lightning.captioner.retrieval import Retrieval


def embeddings(n):
    return torch.nn.functional.normalize(torch.eye(n) + 0.01, dim=-1)


def test_recalls_count_what_is_found():
    video, text = embeddings(4), embeddings(4)[[0, 1, 3, 2]]  # clips 2 and 3 find each other's
    metric = Retrieval()
    metric.update(video[:3], text[:3], ["a", "b", "c"])
    metric.update(video[3:], text[3:], ["d"])
    scores = metric.compute()
    assert scores["video_to_text_at_1"] == 0.5
    assert scores["text_to_video_at_1"] == 0.5
    assert scores["video_to_text_at_5"] == 1
    assert "first_among_32" not in scores  # four captions


def test_a_clip_of_an_equal_caption_is_right():
    metric = Retrieval()
    metric.update(embeddings(2), embeddings(2).flip(0), ["a", "a"])
    assert metric.compute()["video_to_text_at_1"] == 1


def test_the_caption_must_beat_31_different_ones():
    texts, rng = embeddings(40), torch.Generator().manual_seed(0)
    captions = [f"caption {i}" for i in range(40)]
    metric = Retrieval()
    metric.update(texts.repeat(2, 1), texts.repeat(2, 1), captions * 2)
    assert metric.compute()["first_among_32"] == 1
    metric.reset()
    metric.update(torch.randn(40, 40, generator=rng), texts, captions)
    assert metric.compute()["first_among_32"] < 0.2
    metric.reset()
    metric.update(torch.ones(40, 40), torch.ones(40, 40), captions)
    assert metric.compute()["first_among_32"] == 0  # embeddings that are all one find nothing
