"""The small networks: learns, is saved whole, refuses what is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.features.tiny import (
    TinyConfig,
    TinyNetwork,
    contrastive_loss,
    load_tiny,
    save_tiny,
    weights_sha256,
)
from tests.evaluation.conftest import Known


@pytest.fixture
def tiny() -> TinyNetwork:
    return TinyNetwork(TinyConfig(channels=(8, 8, 16, 8), text_width=16, embedding=8)).eval()


def squares(known: list[Known], n: int) -> tuple[Tensor, list[str]]:
    chosen = [one for one in known if one.video.shape[1:3] == (32, 32)][:n]
    videos = torch.stack([torch.from_numpy(one.video).permute(3, 0, 1, 2) for one in chosen])
    return videos, [one.prompt for one in chosen]


def test_it_learns_what_belongs_together(known: list[Known]) -> None:
    network = TinyNetwork(TinyConfig())
    videos, texts = squares(known, 12)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    first = contrastive_loss(network, videos, texts).item()
    for _ in range(30):
        loss = contrastive_loss(network, videos, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    likeness = network.embed_videos(videos) @ network.embed_texts(texts).T
    assert (likeness.argmax(dim=1) == torch.arange(len(texts))).float().mean() > 0.7


def test_a_text_does_not_depend_on_its_neighbours(tiny: TinyNetwork) -> None:
    short, long = "a red circle", "on a gray background a large blue square glides upwards"
    together = tiny.embed_texts([short, long])
    assert torch.allclose(together[0], tiny.embed_texts([short])[0], atol=1e-5)
    assert torch.allclose(together[1], tiny.embed_texts([long])[0], atol=1e-5)


def test_the_order_of_words_counts(tiny: TinyNetwork) -> None:
    texts = ["red circle blue square", "blue circle red square"]
    first, second = tiny.embed_texts(texts)
    assert (first - second).abs().max() > 1e-4


def test_standardised_features_are_standard_and_embeddings_stay(
    tiny: TinyNetwork, known: list[Known]
) -> None:
    videos, _ = squares(known, 12)
    with torch.no_grad():
        before, features = tiny.embed_videos(videos), tiny.features(videos)
        tiny.standardise(features)
        standard = tiny.features(videos)
        assert torch.allclose(standard.mean(dim=0), torch.zeros(16), atol=1e-4)
        assert torch.allclose(standard.std(dim=0), torch.ones(16), atol=1e-3)
        assert torch.allclose(tiny.embed_videos(videos), before, atol=1e-4)


def test_features_notice_a_still(tiny: TinyNetwork, known: list[Known]) -> None:
    """Half of the features measure change from frame to frame, and a still has none."""
    videos, _ = squares(known, 4)
    still = videos[:, :, :1].expand(-1, -1, 17, -1, -1).contiguous()
    change, change_of_still = (tiny.features(v)[:, :8].abs().mean() for v in (videos, still))
    # The first and last frames meet padding, so that a still is not quite 0.
    assert change_of_still < 0.9 * change


@pytest.mark.parametrize(
    "videos",
    [
        torch.zeros(1, 3, 17, 32, 32),
        torch.zeros(3, 17, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_other_videos_are_refused(tiny: TinyNetwork, videos: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8|clips of 3 frames: tiny needs at least 4"):
        tiny.features(videos)


def test_a_text_without_words_is_refused(tiny: TinyNetwork) -> None:
    with pytest.raises(ValueError, match="holds no word"):
        tiny.embed_texts(["a circle", "..."])


def test_saved_and_loaded_it_is_the_same(tiny: TinyNetwork, tmp_path: Path) -> None:
    sha256 = save_tiny(tiny, tmp_path / "new" / "network.pt", {"top1": 0.5})
    loaded = load_tiny(tmp_path / "new" / "network.pt")
    assert loaded.sha256 == sha256 == weights_sha256(loaded.network)
    assert loaded.notes == {"top1": 0.5}
    assert not loaded.network.training
    texts = ["a red circle moves left"]
    assert torch.equal(loaded.network.embed_texts(texts), tiny.embed_texts(texts))


def test_a_changed_weight_is_refused_with_both_hashes(tiny: TinyNetwork, tmp_path: Path) -> None:
    path = tmp_path / "network.pt"
    sha256 = save_tiny(tiny, path, {})
    payload = torch.load(path, weights_only=True)
    payload["weights"]["project.bias"][0] += 1e-3
    torch.save(payload, path)
    with pytest.raises(ValueError, match=f"weights have sha256 [0-9a-f]{{64}}, and {sha256}"):
        load_tiny(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_tiny(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_tiny(tmp_path / "text.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not small networks"):
        load_tiny(tmp_path / "other.pt")
