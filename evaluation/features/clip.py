"""CLIP from a local folder in the format of Hugging Face transformers.

Texts are truncated by the tokenizer, which keeps the end token. The text embedding is read at that
token; truncating the ids instead would make all long captions alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from evaluation.features.extractor import RANDOM, VideoTextExtractor
from evaluation.features.weights import check_digest

# Mean and standard deviation of the training images (Radford et al., 2021).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(VideoTextExtractor):
    """Embeds frames, videos and texts as unit vectors of one space.

    The embedding of a video is the normalised mean of its frame embeddings. ``frame_scores``
    returns the values that the CLIP score averages.

    Args:
        folder: Folder with ``config.json``, ``model.safetensors`` and the tokenizer's files;
            nothing is downloaded.
        digest: Expected hash of ``model.safetensors``, ``sha256:...`` or ``git:...``; without one
            the score is named ``unverified``.
        num_frames: Number of frames of a video to embed, uniformly spaced, including the first
            and the last.
        random: Initialise the weights randomly instead of reading them, for tests.
    """

    def __init__(
        self, folder: Path, digest: str = "", num_frames: int = 8, random: bool = False
    ) -> None:
        super().__init__()
        if num_frames < 1:
            raise ValueError(f"num_frames = {num_frames}: must be at least 1")
        self.num_frames = num_frames
        self.model, self.tokenizer = _loaded(folder, digest, random)
        vision, text = self.model.config.vision_config, self.model.config.text_config
        self.side, self.max_words = vision.image_size, text.max_position_embeddings
        self.feature_dim = self.model.config.projection_dim
        size = {768: "b", 1024: "l", 1280: "h", 1408: "g"}.get(vision.hidden_size)
        # Scores of ViT-B/32 and ViT-L/14 are not comparable, so the model is part of the name.
        model = f"vit-{size}{vision.patch_size}" if size else f"vit-{vision.hidden_size}"
        self.kind = f"clip-{model}-{self.side}"
        self.standing = RANDOM if random else ("" if digest else "unverified")
        self.settings = {
            "filter": "bicubic-antialias",
            "fit": "cover",
            "side": self.side,
            "num_frames": num_frames,
            "max_words": self.max_words,
        }
        self.freeze()

    def features(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b e"]:
        return self.embed_videos(videos)

    def embed_videos(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b e"]:
        return F.normalize(self.embed_frames(videos, self.num_frames).mean(dim=1), dim=-1)

    def embed_frames(
        self, videos: UInt8[Tensor, "b 3 F H W"], num_frames: int | None = None
    ) -> Float[Tensor, "b K e"]:
        """Embeddings of ``num_frames`` uniformly spaced frames, or of all frames if None."""
        self.check(videos)
        if num_frames is not None:
            videos = videos[:, :, spaced(videos.shape[2], num_frames)]
        frames = rearrange(videos, "b c F H W -> (b F) c H W")
        embedded = self.model.get_image_features(pixel_values=self.pixels(frames))
        rows = F.normalize(_pooled(embedded), dim=-1)
        return rearrange(rows, "(b F) e -> b F e", b=len(videos))

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings of texts. Raises ``ValueError`` for an empty text."""
        for text in texts:
            if not text.strip():
                raise ValueError(f"text {text!r}: is empty")
        asked = self._tokenized(texts)
        return F.normalize(_pooled(self.model.get_text_features(**asked)), dim=-1)

    def frame_scores(
        self, videos: UInt8[Tensor, "b 3 F H W"], texts: Sequence[str]
    ) -> Float[Tensor, "b K"]:
        """100 times the cosine of each of ``num_frames`` frames with the video's text."""
        frames = self.embed_frames(videos, self.num_frames)
        return 100 * torch.einsum("bke,be->bk", frames, self.embed_texts(texts))

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Return which texts are longer than the network's context."""
        ids = self.tokenizer(list(texts))["input_ids"]
        return [len(row) > self.max_words for row in ids]

    def pixels(self, frames: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 side side"]:
        """Preprocess frames as the model's own processor does.

        The short side is resized by a bicubic filter with antialiasing on integer levels; frames
        are then center-cropped and normalised.
        """
        short = min(frames.shape[2:])
        height, width = (int(n * self.side / short) for n in frames.shape[2:])
        # On integer levels torch rounds between its two passes, as Pillow does.
        resized = F.interpolate(frames, size=[height, width], mode="bicubic", antialias=True)
        top, left = (height - self.side) // 2, (width - self.side) // 2
        cut = resized[:, :, top : top + self.side, left : left + self.side]
        mean, std = (
            torch.tensor(values, device=frames.device)[:, None, None] for values in (MEAN, STD)
        )
        return (cut.float() / 255 - mean) / std

    def _tokenized(self, texts: Sequence[str]) -> dict[str, Int[Tensor, "b l"]]:
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_words,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def spaced(num_frames: int, count: int) -> list[int]:
    """Indices of ``count`` frames uniformly spaced over ``num_frames``, including both ends.

    Each frame is used at most once.
    """
    count = min(count, num_frames)
    places = torch.linspace(0, num_frames - 1, count) if count > 1 else torch.tensor([0.0])
    return places.round().long().tolist()


def _pooled(output: Any) -> Float[Tensor, "b e"]:
    # transformers 5 returns an object, transformers 4 the tensor.
    return output if isinstance(output, Tensor) else output.pooler_output


def _loaded(folder: Path, digest: str, random: bool) -> tuple[Any, Any]:
    try:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise ValueError(
            "CLIP needs transformers: pip install 'sora-lightning[reference]'"
        ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"CLIP folder {folder}: holds no config.json")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True)), tokenizer
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"CLIP folder {folder}: holds no model.safetensors")
    if digest:
        check_digest(weights, digest)
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise ValueError(f"{weights}: cannot be read as weights ({error})") from error
    return model, tokenizer
