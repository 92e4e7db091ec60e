"""A small network, trained in a minute: a video and a text tower with a contrastive loss.

It is used if the public networks (I3D for FVD, CLIP for the CLIP score) are not available. Its
scores are named ``fvd-tiny`` and ``clip_score-tiny``, and are not comparable with published values.
Contrastive loss: Radford et al., 2021.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.features.extractor import RANDOM, VideoTextExtractor, drawn
from evaluation.features.weights import read_weights, weights_sha256


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the towers.

    Videos are resized to ``side`` x ``side``; words are hashed into ``num_words``.
    """

    side: int = 32
    channels: tuple[int, ...] = (16, 32, 64, 32)
    text_width: int = 64
    text_depth: int = 2
    num_words: int = 1024
    max_words: int = 48
    embedding: int = 48


class TinyNetwork(VideoTextExtractor):
    """Features of videos, and embeddings of videos and texts whose cosine measures how well they
    match.

    Videos are uint8 RGB ``b 3 F H W`` of any size, with at least 4 frames at the frame rate of the
    training.
    """

    kind = "tiny"
    least_frames = 4
    standing = ""
    centre: Tensor
    spread: Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_dim = config.channels[0] + config.channels[-1]
        self.settings = {"side": config.side}
        first, *others = _stages(config.channels)
        self.first_stage, self.other_stages = first, nn.Sequential(*others)
        self.text_tower = _TextTower(config)
        self.project = nn.Linear(self.feature_dim, config.embedding)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.register_buffer("centre", torch.zeros(self.feature_dim))
        self.register_buffer("spread", torch.ones(self.feature_dim))

    def features(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b d"]:
        """Features for the Fréchet distance, with mean 0 and std 1 over the training clips.

        The means of the last convolution over space and time describe the content. The mean change
        of the first convolution between frames describes the motion: it is zero for a still video,
        and large for noise and shuffled frames. Raises ``ValueError`` for videos of another type or
        layout, or with fewer than 4 frames.
        """
        self.check(videos)
        frames = rearrange(videos, "b c F H W -> (b F) c H W").float() / 127.5 - 1
        frames = F.interpolate(frames, size=[self.config.side] * 2, mode="bilinear", antialias=True)
        clips = rearrange(frames, "(b F) c h w -> b c F h w", b=len(videos))
        early = self.first_stage(clips)  # b d F/2 h/2 w/2
        change = reduce(early.diff(dim=2).abs(), "b d f h w -> b d", "mean")
        content = reduce(self.other_stages(early), "b d f h w -> b d", "mean")
        return (torch.cat([change, content], dim=1) - self.centre) / self.spread

    @torch.no_grad()
    def standardise(self, features: Float[Tensor, "n d"]) -> None:
        """Rescale ``features``, those of the training clips, to mean 0 and std 1.

        Embeddings do not change.
        """
        centre, spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-4)
        self.centre.add_(centre * self.spread)
        self.spread.mul_(spread)
        self.project.bias.add_(self.project.weight @ centre)
        self.project.weight.mul_(spread)

    def embed_videos(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b e"]:
        """Embeddings of videos as unit vectors."""
        return self.embed_features(self.features(videos))

    def embed_features(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """Embeddings of videos as unit vectors, from their ``features``."""
        return F.normalize(self.project(features), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings of texts as unit vectors.

        Words beyond ``max_words`` are ignored. Raises ``ValueError`` for a text without words.
        """
        words, mask = self._hashed(texts)
        return F.normalize(self.text_tower(words, mask), dim=-1)

    def _hashed(self, texts: Sequence[str]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        rows = [re.findall(r"\w+", text.lower())[: self.config.max_words] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"text {text!r}: holds no word")
        length = max(map(len, rows))
        device = self.log_scale.device
        hashed = [[zlib.crc32(w.encode()) % self.config.num_words for w in row] for row in rows]
        words = torch.tensor([row + [0] * (length - len(row)) for row in hashed], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return words, torch.arange(length, device=device) < lengths[:, None]


def _stages(channels: tuple[int, ...]) -> list[nn.Sequential]:
    """Each stage halves height and width; the first and the third also halve time."""
    stages = []
    for stage, (fan_in, fan_out) in enumerate(zip((3, *channels[:-1]), channels, strict=True)):
        stride = (1 if stage % 2 else 2, 2, 2)
        convolution = nn.Conv3d(fan_in, fan_out, 3, stride, padding=1)
        stages.append(nn.Sequential(convolution, nn.GroupNorm(8, fan_out), nn.SiLU()))
    return stages


class _TextTower(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width = config.text_width
        self.words = nn.Embedding(config.num_words, width)
        self.places = nn.Parameter(0.02 * torch.randn(config.max_words, width))
        layer = nn.TransformerEncoderLayer(
            width,
            nhead=4,
            dim_feedforward=2 * width,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, config.text_depth, enable_nested_tensor=False)
        self.project = nn.Linear(width, config.embedding)

    def forward(self, words: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b e"]:
        x = self.words(words) + self.places[: words.shape[1]]  # b l d
        x = self.blocks(x, src_key_padding_mask=~mask)
        weight = mask.float() / mask.sum(dim=1, keepdim=True)
        return self.project(torch.einsum("bld,bl->bd", x, weight))


def contrastive_loss(
    network: TinyNetwork, videos: UInt8[Tensor, "b 3 F H W"], texts: Sequence[str]
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of matching clips and texts within the batch.

    All clips of the batch with the same text are correct matches of it.
    """
    logits = network.log_scale.exp() * network.embed_videos(videos) @ network.embed_texts(texts).T
    same = torch.tensor([[float(a == b) for a in texts] for b in texts], device=logits.device)
    right = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def save_tiny(network: TinyNetwork, path: Path, notes: dict[str, float]) -> str:
    """Write configuration, weights, their hash and notes (such as accuracies) to a file.

    Returns the hash.
    """
    sha256 = weights_sha256(network)
    payload = {
        "kind": "small networks",
        "config": asdict(network.config),
        "weights": network.state_dict(),
        "sha256": sha256,
        "notes": notes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    torch.save(payload, unfinished)
    unfinished.replace(path)
    return sha256


@dataclass(frozen=True)
class SavedTiny:
    """A network in eval mode, the hash of its weights, and the notes saved with it."""

    network: TinyNetwork
    sha256: str
    notes: dict[str, float]


def load_tiny(path: Path) -> SavedTiny:
    """Load a network saved by ``save_tiny``.

    Raises ``ValueError`` for a file that is missing, holds no such network, or whose weights do not
    match their hash.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `python -m evaluation train-tiny` makes one")
    payload = read_weights(path)
    if payload.get("kind") != "small networks":
        raise ValueError(
            f"{path}: is not small networks; `python -m evaluation train-tiny` makes one"
        )
    config = payload["config"]
    network = TinyNetwork(TinyConfig(**{**config, "channels": tuple(config["channels"])}))
    network.load_state_dict(payload["weights"])
    actual = weights_sha256(network)
    if actual != payload["sha256"]:
        raise ValueError(f"{path}: weights have sha256 {actual}, and {payload['sha256']} was saved")
    network.sha256 = actual
    return SavedTiny(network.eval(), actual, payload["notes"])


class TinyFile(VideoTextExtractor):
    """A saved network by its path, for use in a YAML.

    Args:
        weights: A file written by ``python -m evaluation train-tiny``, or ``random`` for an
            untrained network.
    """

    kind = "tiny"
    least_frames = 4

    def __init__(self, weights: str) -> None:
        super().__init__()
        if weights == RANDOM:
            self.network, self.standing = drawn(lambda: TinyNetwork(TinyConfig())), RANDOM
        else:
            self.network, self.standing = load_tiny(Path(weights)).network, ""
        self.feature_dim, self.settings = self.network.feature_dim, self.network.settings
        self.freeze()

    def features(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b d"]:
        return self.network.features(videos)

    def embed_videos(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b e"]:
        """Embeddings of videos as unit vectors."""
        return self.network.embed_videos(videos)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings of texts as unit vectors; see ``TinyNetwork.embed_texts``."""
        return self.network.embed_texts(texts)
