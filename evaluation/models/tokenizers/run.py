"""Evaluation of a tokenizer's checkpoint on clips, with a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from evaluation.distances import FeatureSets, frechet_scores
from evaluation.fingerprint import fingerprint, texts_sha256
from evaluation.metrics.score import Score
from evaluation.models.tokenizers.baselines import (
    Video,
    bicubic_in_space,
    bicubic_in_space_and_time,
    h264,
)
from evaluation.models.tokenizers.distances import OURS, distances, summary
from evaluation.models.tokenizers.probes import (
    DEAD_BITS,
    bits_per_channel,
    causality,
    quantised,
    seams,
    smallest_tiling,
    tile_seams,
)
from evaluation.models.tokenizers.strip import write_strip
from evaluation.networks import build_extractors, score_name
from evaluation.protocol import Protocol
from evaluation.report.write import write_report
from sora_lightning.checkpoints import load_tokenizer, read_checkpoint
from sora_lightning.data import Batching, Reading, VideoDataModule
from sora_lightning.files import file_sha256
from sora_lightning.tokenizers import (
    CausalTokenizer,
    PerceptualDistance,
    VideoTokenizer,
)
from sora_lightning.types import VideoSize, as_levels

_SEED = 0
_STRIP_CLIPS, _STRIP_FRAMES = 3, 3
_PROBED_CLIPS = 2
_SEAMS = {
    "latents": "Largest difference between a clip in pieces and whole, in standard deviations.",
    "pixels": "Largest difference between a clip in pieces and whole, in 0..255.",
}
_TILE_SEAMS = {
    "pixels": "Largest difference between frames in the smallest tiles and whole, in 0..255.",
    "colour": "Largest difference of a colour's mean over a latent position and all frames.",
}


@dataclass(frozen=True)
class TokenizerRequest:
    """Checkpoint of a tokenizer, and the clips to evaluate it on.

    Clips are the middle windows of a manifest's videos, at ``sizes`` and ``fps`` as read by the
    data module. ``protocol`` and ``networks`` define the network of rFVD, and ``lpips`` is the file
    of VGG's weights; without them these scores are left out. ``strip`` is the path of an image of
    clips and reconstructions.
    """

    checkpoint: Path
    reference: Path
    sizes: tuple[str, ...]
    fps: float
    output: Path
    strip: Path
    protocol: Protocol | None = None
    networks: Path | None = None
    lpips: Path | None = None
    device: str = "cpu"
    root: str | None = None


@dataclass(frozen=True)
class RebuiltClip:
    """A clip and its reconstruction by each method, at 8 bits a value or in as many bytes."""

    name: str
    caption: str
    pixels: Float[Tensor, "1 3 F H W"]
    real: Video
    ways: dict[str, Video]
    record: dict[str, Any]

    @property
    def size(self) -> str:
        return "x".join(map(str, self.real.shape[:3]))


def holds_only_a_tokenizer(checkpoint: Path) -> bool:
    """Return True for a checkpoint of a system that trains a tokenizer.

    Raises ``ValueError`` for a file that is not a checkpoint.
    """
    system = str(read_checkpoint(checkpoint)["hyper_parameters"].get("_class_path", ""))
    return system.endswith(".TokenizerSystem")


@torch.no_grad()
def evaluate_tokenizer(request: TokenizerRequest) -> dict[str, Any]:
    """Encode and decode clips, compare them, run the probes, write the report, and return it.

    The files are ``report.json``, ``report.html``, TensorBoard logs and the strip. Raises
    ``ValueError`` naming the problem before any clip is reconstructed.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(request.checkpoint).to(request.device)
    network = PerceptualDistance(request.lpips) if request.lpips else None
    left_out = [] if network else ["lpips: no weights of VGG-16 were given (--lpips)"]
    clips = _rebuilt_clips(request, tokenizer)
    real = [clip.real for clip in clips]
    values = {
        way: distances(real, [clip.ways[way] for clip in clips], network) for way in clips[0].ways
    }
    sizes = [clip.size for clip in clips]
    scores = summary(values, sizes, _SEED)
    rfvd, networks, missing = _rfvd(request, clips)
    if request.lpips is not None:
        networks["lpips"] = f"VGG-16, sha256 {file_sha256(request.lpips)}"
    scores |= rfvd | _probes(tokenizer, [clip.pixels.to(request.device) for clip in clips])
    for index, clip in enumerate(clips):
        clip.record.update(
            {f"{way}/psnr": round(float(v["psnr"][index]), 3) for way, v in values.items()}
        )
    report = _report(request, clips, scores, networks, [*left_out, *missing])
    report["seconds"] = round(time.monotonic() - started, 1)
    ours = [clip.ways[OURS] for clip in clips]
    write_report(report, ours, real, request.fps, request.output)
    _write_strip(clips, request.strip)
    return report


def _rebuilt_clips(request: TokenizerRequest, tokenizer: VideoTokenizer) -> list[RebuiltClip]:
    for size in request.sizes:
        tokenizer.compression.grid(VideoSize.parse(size))
    largest = max(prod(astuple(VideoSize.parse(size))) for size in request.sizes)
    data = VideoDataModule(
        manifest=request.reference,
        val_manifest=request.reference,
        fps=request.fps,
        batching=Batching(list(request.sizes), largest),
        reading=Reading(root=request.root),
    )
    data.setup("validate")
    loader = data.val_dataloader()
    clips = []
    for batch in tqdm(loader, "rebuild", unit="batch"):
        for name, caption, pixels in zip(batch.clip_ids, batch.captions, batch.pixels, strict=True):
            clips.append(_rebuild(request, tokenizer, name, caption, pixels[None]))
    return clips


def _rebuild(
    request: TokenizerRequest,
    tokenizer: VideoTokenizer,
    name: str,
    caption: str,
    pixels: Float[Tensor, "1 3 F H W"],
) -> RebuiltClip:
    """Reconstruct a clip by every method.

    Baselines have the latents' number of values, or their number of bytes at 8 bits a value.
    """
    latents = tokenizer.encode(pixels.to(request.device))
    coarse, num_bytes = quantised(latents)
    real = _video(pixels)
    space = bicubic_in_space(real, latents.numel())
    both = bicubic_in_space_and_time(real, latents.numel())
    coded = h264(real, num_bytes, request.fps)
    ways = {
        OURS: _video(tokenizer.decode(coarse)),
        "unquantised": _video(tokenizer.decode(latents)),
        "bicubic": space.video,
        "bicubic_time": both.video,
        "h264": coded.video,
    }
    record = {
        "values": latents.numel(),
        "bytes": num_bytes,
        "bicubic": space.setting,
        "bicubic_time": both.setting,
        "h264": f"{coded.size} bytes, {coded.setting}",
    }
    return RebuiltClip(name, caption, pixels, real, ways, record)


def _video(pixels: Float[Tensor, "1 3 F H W"]) -> Video:
    return rearrange(as_levels(pixels.cpu()), "1 c F H W -> F H W c").numpy()


def _rfvd(
    request: TokenizerRequest, clips: Sequence[RebuiltClip]
) -> tuple[dict[str, Score], dict[str, Any], list[str]]:
    """Return rFVD over clips of the most frequent size, its networks, and why it was left out."""
    if request.protocol is None:
        return {}, {}, ["rfvd: no protocol was given"]
    spec = request.protocol.scores
    sizes = [clip.size for clip in clips]
    size = max(set(sizes), key=sizes.count)
    chosen = [clip for clip in clips if clip.size == size]
    if len(chosen) < spec.least_videos:
        few = f"rfvd: needs {spec.least_videos} clips of one size, and {size} has {len(chosen)}"
        return {}, {}, [few]
    if request.networks is not None and not request.networks.exists():
        return {}, {}, [f"rfvd: {request.networks} does not exist; `make demo` trains it"]
    extractors = build_extractors(request.protocol, request.networks, request.device)
    frames, height, width = chosen[0].real.shape[:3]
    extractors.videos.check_size(frames, height, width)
    ours, real = (
        torch.cat(
            [
                extractors.features(rearrange(torch.from_numpy(v), "F H W c -> 1 c F H W"))
                for v in side
            ]
        )
        for side in ([c.ways[OURS] for c in chosen], [c.real for c in chosen])
    )
    # The prefix r marks reconstructions; the rest names the network.
    names = f"r{score_name('fvd', extractors.videos)}", f"r{score_name('kvd', extractors.videos)}"
    found = frechet_scores(FeatureSets(ours, real), spec, names)
    scores = {f"{OURS}/{name}": score for name, score in found.items()}
    return scores, extractors.record(), []


def _probes(
    tokenizer: VideoTokenizer, videos: Sequence[Float[Tensor, "1 3 F H W"]]
) -> dict[str, Score]:
    longest = sorted(videos, key=lambda video: -video.shape[2])[:_PROBED_CLIPS]
    longest = [video for video in longest if video.shape[2] > tokenizer.compression.frames]
    scores = {}
    if longest:
        found = [causality(tokenizer, video) for video in longest]
        n = len(found)
        for name, meaning in (
            (
                "latents",
                "Largest change of earlier latents, in stds, when later frames are replaced",
            ),
            ("pixels", "Largest change of earlier pixels, of 255, when later latents are replaced"),
        ):
            worst = max(getattr(one, name) for one in found)
            text = f"{meaning}: 0 up to rounding if no frame depends on later ones."
            scores[f"{OURS}/causality/{name}"] = Score(worst, n, text, "lower")
        control = min(one.control for one in found)
        text = "Largest change of later latents in this test, least over clips; must be above 0."
        scores[f"{OURS}/causality/control"] = Score(control, n, text, "")
        if isinstance(tokenizer, CausalTokenizer):
            pairs = [seams(tokenizer, video) for video in longest]
            scores |= _worst_of_pairs("seams", pairs, _SEAMS)
    tile = smallest_tiling(tokenizer).tile
    if large := [video for video in videos if max(video.shape[3:]) > tile][:_PROBED_CLIPS]:
        pairs = [tile_seams(tokenizer, video) for video in large]
        scores |= _worst_of_pairs("tiles", pairs, _TILE_SEAMS)
    bits = bits_per_channel(tokenizer, videos)
    dead = float((bits < DEAD_BITS).double().mean())
    text = (
        f"Share of latent channels with less than {DEAD_BITS} bit of information about the clips."
    )
    scores[f"{OURS}/dead_channels"] = Score(dead, len(bits), text, "lower")
    text = "Information of a latent value about the clips in bits, mean over channels."
    scores[f"{OURS}/bits_per_value"] = Score(float(bits.mean()), len(bits), text, "")
    return scores


def _worst_of_pairs(
    group: str, pairs: Sequence[tuple[float, float]], meanings: dict[str, str]
) -> dict[str, Score]:
    worst = [max(values) for values in zip(*pairs, strict=True)]
    return {
        f"{OURS}/{group}/{name}": Score(value, len(pairs), meaning, "lower")
        for (name, meaning), value in zip(meanings.items(), worst, strict=True)
    }


def _report(
    request: TokenizerRequest,
    clips: Sequence[RebuiltClip],
    scores: dict[str, Score],
    networks: dict[str, Any],
    left_out: Sequence[str],
) -> dict[str, Any]:
    content = read_checkpoint(request.checkpoint)
    captions = texts_sha256([clip.caption for clip in clips])
    settings = {
        "clips": {"sizes": list(request.sizes), "fps": request.fps, "window": "middle"},
        "scores": {},
        "sampling": {},
        "networks": networks,
        "baselines": "bicubic at as many values, H.264 in as many bytes, 8 bits a latent value",
        "prompts_sha256": captions,
        "reference_sha256": texts_sha256([clip.name for clip in clips]),
        "num_videos": len(clips),
        "num_reference": len(clips),
    }
    packages = ("torch", "torchmetrics", "numpy", "av")
    return {
        "contents": f"{len(clips)} clips reconstructed by the tokenizer, with the originals",
        "scores": {name: score.value for name, score in scores.items()},
        "details": {name: asdict(score) for name, score in scores.items()},
        "protocol": request.protocol.name if request.protocol else "none",
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "checkpoint": {
            "path": str(request.checkpoint),
            "sha256": file_sha256(request.checkpoint),
            "step": int(content.get("global_step", 0)),
        },
        "networks": {"left out": "; ".join(left_out) or "nothing"},
        "reference": str(request.reference),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "device": request.device,
        "left_out": list(left_out),
        "videos": [
            {"prompt": clip.caption, "clip": clip.name, "size": clip.size, **clip.record}
            for clip in clips
        ],
    }


def _write_strip(clips: Sequence[RebuiltClip], path: Path) -> None:
    """Write a strip of evenly spaced clips."""
    number = min(_STRIP_CLIPS, len(clips))
    chosen = [clips[round(i * (len(clips) - 1) / max(1, number - 1))] for i in range(number)]
    rows = {"original": [clip.real for clip in chosen]}
    titles = {
        OURS: "ours",
        "bicubic": "bicubic",
        "bicubic_time": "bicubic in time",
        "h264": "H.264",
    }
    rows |= {title: [clip.ways[way] for clip in chosen] for way, title in titles.items()}
    write_strip(rows, [clip.caption for clip in chosen], _STRIP_FRAMES, path)
