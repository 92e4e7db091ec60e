"""Tasks of a model that was trained on masks of known frames: extend, connect, loop, inpaint, edit,
and videos longer than those of the training.

The tokenizer is causal: a clip's first latent frame holds one frame, each later one
``compression.frames``. The context is therefore 1 + a multiple of that many frames. Context at the
end of a clip is encoded by itself, and all but its first latent frame replaces the last latent
frames of the clip. In training these latents had all the past before them; here they have one frame
of it.

The first frame of such a context is the last of a latent frame that is sampled. Its difference to
the given frame fades in over the frames of that latent frame. Then the last steps, a share of
``resample_strength``, are taken once more from the result (SDEdit, arXiv 2108.01073): a shape shown
a little beside its place merges with the one in its place.
"""

from __future__ import annotations

import torch
from einops import reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.diffusion import Known
from sora_lightning.generation.generator import InitLatents, KnownFrames, VideoGenerator
from sora_lightning.types import Compression, TokenGrid, VideoSize


def extend(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    num_frames: int,
    window: int,
    context: int,
) -> Float[Tensor, "b 3 _G H W"]:
    """Extend a video to ``num_frames`` frames in all, window by window.

    Each window of ``window`` frames begins with the last ``context`` frames so far. Frames before
    the first context are returned unchanged, those of a context as the tokenizer reconstructs them.
    """
    grid = _window(video_generator, video, window, context)
    head = video_generator.tokenizer.compression.grid(_size(video, context)).f
    for chunk in _chunks(video.shape[2], num_frames, window - context):
        latents = _empty(video_generator, video, grid)
        latents[:, :, :head] = video_generator.tokenizer.encode(video[:, :, -context:])
        known = KnownFrames(
            latents, _frames_mask(latents, first=head), video_generator.sampling.frame_noise
        )
        made = _decode(video_generator, prompts, seeds, chunk, known, grid)
        video = torch.cat([video[:, :, :-context], made], dim=2)
    return video[:, :, :num_frames]


def extend_backward(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    num_frames: int,
    window: int,
    context: int,
) -> Float[Tensor, "b 3 _G H W"]:
    """Extend a video backward in time to ``num_frames`` frames in all.

    Each window ends with the first ``context`` frames so far. See ``extend``.
    """
    grid = _window(video_generator, video, window, context)
    for chunk in _chunks(video.shape[2], num_frames, window - context):
        latents, tail, given = _place_end(video_generator, video[:, :, :context], grid)
        known = KnownFrames(
            latents, _frames_mask(latents, last=tail), video_generator.sampling.frame_noise
        )
        made = _decode_to(video_generator, prompts, seeds, chunk, known, given)
        video = torch.cat([made, video[:, :, context:]], dim=2)
    return video[:, :, -num_frames:]


def connect(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    first: Float[Tensor, "b 3 F H W"],
    second: Float[Tensor, "b 3 G H W"],
    window: int,
    context: int,
) -> Float[Tensor, "b 3 _I H W"]:
    """Connect two videos by ``window - 2 context`` new frames.

    The new frames are sampled with ``context`` frames of each video known.
    """
    bridge = _bridge(video_generator, prompts, seeds, (first, second), window, context)
    return torch.cat([first[:, :, :-context], bridge, second[:, :, context:]], dim=2)


def loop(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    window: int,
    context: int,
) -> Float[Tensor, "b 3 _G H W"]:
    """Append ``window - 2 context`` new frames that lead from a video's end back to its start.

    The first and the last ``context`` frames are returned as the tokenizer reconstructs them.
    Frames that are both are reconstructed as the first.
    """
    bridge = _bridge(video_generator, prompts, seeds, (video, video), window, context)
    start, end, new = (
        bridge[:, :, -context:],
        bridge[:, :, :context],
        bridge[:, :, context:-context],
    )
    num_middle = video.shape[2] - 2 * context
    middle = video[:, :, context : context + max(num_middle, 0)]
    return torch.cat([start, middle, end[:, :, max(-num_middle, 0) :], new], dim=2)


def inpaint(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    repaint: Bool[Tensor, "b 1 F H W"],
) -> Float[Tensor, "b 3 F H W"]:
    """Sample the masked pixels of a video anew.

    A token is sampled where any of its pixels is masked; the others are returned as the tokenizer
    reconstructs them.
    """
    if repaint.shape != video[:, :1].shape:
        raise ValueError(
            f"a mask of {tuple(repaint.shape[2:])} for a video of {tuple(video.shape[2:])}: both "
            "must have the same frames, rows and columns"
        )
    compression = video_generator.tokenizer.compression
    grid = compression.grid(_size(video))
    latents = video_generator.tokenizer.encode(video)
    whole = Known.of(~_touched(repaint, compression), video_generator.denoiser.patch)
    known = KnownFrames(latents, whole.mask, video_generator.sampling.frame_noise)
    made = _decode(video_generator, prompts, seeds, 0, known, grid)
    kept = _to_pixels(known.mask, compression).to(made.device)
    return torch.where(kept, video_generator.tokenizer.decode(latents), made)


def edit(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    strength: float,
    sources: list[str] | None = None,
    source_guidance: float = 2.0,
) -> Float[Tensor, "b 3 F H W"]:
    """Edit a video by adding noise and denoising under the prompts (SDEdit, arXiv 2108.01073).

    A larger ``strength`` keeps less of the video. With ``sources``, descriptions of the video, only
    their difference to the prompts is applied (FlowEdit, arXiv 2412.08629); ``source_guidance`` is
    their guidance scale.
    """
    grid = video_generator.tokenizer.compression.grid(_size(video))
    init = InitLatents(video_generator.tokenizer.encode(video), strength)
    if sources is not None:
        edited = video_generator.edited(prompts, sources, seeds, init, source_guidance)
        return video_generator.tokenizer.decode(edited)
    return video_generator.tokenizer.decode(
        video_generator.latents(prompts, grid, seeds, init=init)
    )


def instruct(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
) -> Float[Tensor, "b 3 F H W"]:
    """Edit a video by instructions, with a model trained on ``VideoEditing`` (InstructPix2Pix,
    arXiv 2211.09800).

    ``guidance.frame_guidance`` is the weight of the video, ``guidance.scale`` that of the
    instruction.
    """
    latents = video_generator.tokenizer.encode(video)
    whole = torch.ones_like(latents[:, :1], dtype=torch.bool)
    source = KnownFrames(latents, whole, video_generator.sampling.frame_noise, keep=False)
    grid = video_generator.tokenizer.compression.grid(_size(video))
    return _decode(video_generator, prompts, seeds, 0, source, grid)


def _bridge(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    ends: tuple[Tensor, Tensor],
    window: int,
    context: int,
) -> Float[Tensor, "b 3 _window H W"]:
    """Sample a window that starts with the end of one video and ends with the start of another."""
    first, second = ends
    if first.shape[3:] != second.shape[3:]:
        raise ValueError(f"videos of {_size(first)} and {_size(second)}: must be of one size")
    _window(video_generator, second, window, context)
    grid = _window(video_generator, first, window, context, both_ends=True)
    latents, tail, given = _place_end(video_generator, second[:, :, :context], grid)
    begin = video_generator.tokenizer.encode(first[:, :, -context:])
    head = begin.shape[2]
    latents[:, :, :head] = begin
    known = KnownFrames(
        latents, _frames_mask(latents, head, tail), video_generator.sampling.frame_noise
    )
    return _decode_to(video_generator, prompts, seeds, 0, known, given)


def _window(
    video_generator: VideoGenerator,
    video: Float[Tensor, "b 3 F H W"],
    window: int,
    context: int,
    both_ends: bool = False,
) -> TokenGrid:
    """Return the latent grid of a window. Raises ``ValueError`` for numbers of frames that do not
    fit.
    """
    compression, patch = video_generator.tokenizer.compression, video_generator.denoiser.patch
    grid = compression.grid(_size(video, window))
    head = compression.grid(_size(video, context)).f
    if video.shape[2] < context:
        raise ValueError(
            f"a video of {video.shape[2]} frames is shorter than the context of {context}"
        )
    known = 2 * head - 1 if both_ends else head
    if known >= grid.f:
        raise ValueError(
            f"context = {context} frames{' at both ends' if both_ends else ''} leave nothing to "
            f"make in a window of {window}: these are {known} of its {grid.f} latent frames"
        )
    if patch.f > 1:
        raise ValueError(
            f"the denoiser's tokens hold {patch.f} latent frames, and frames are known one by one: "
            "the patch must be 1 in time"
        )
    return grid


def _place_end(
    video_generator: VideoGenerator, frames: Float[Tensor, "b 3 k H W"], grid: TokenGrid
) -> tuple[Float[Tensor, "b c f h w"], int, Float[Tensor, "b 3 k H W"]]:
    """Return latents that end with the frames, the number of these latent frames, and the frames
    as reconstructed.

    Raises ``ValueError`` for a single frame, which makes no later latent frame.
    """
    encoded = video_generator.tokenizer.encode(frames)
    tail = encoded.shape[2] - 1
    if not tail:
        step = video_generator.tokenizer.compression.frames
        raise ValueError(
            f"context = 1 frame: at the end of a clip a latent frame holds {step} frames, so the "
            f"context must be 1 + a multiple of {step}, at least {1 + step}"
        )
    latents = _empty(video_generator, frames, grid)
    latents[:, :, -tail:] = encoded[:, :, 1:]
    return latents, tail, video_generator.tokenizer.decode(encoded)


def _decode_to(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    chunk: int,
    known: KnownFrames,
    given: Float[Tensor, "b 3 k H W"],
) -> Float[Tensor, "b 3 F H W"]:
    """Sample a window that ends with the given frames, then resample its last steps."""
    tokenizer = video_generator.tokenizer
    together, grid = tokenizer.compression.frames, TokenGrid(*known.latents.shape[2:])
    made = _decode(video_generator, prompts, seeds, chunk, known, grid)
    video = _leading_to(made, given, together)
    if not (strength := video_generator.sampling.resample_strength):
        return video
    init = InitLatents(tokenizer.encode(video), strength)
    made = _decode(video_generator, prompts, seeds, chunk, known, grid, init)
    return _leading_to(made, given, together)


def _leading_to(
    made: Float[Tensor, "b 3 F H W"], given: Float[Tensor, "b 3 k H W"], together: int
) -> Float[Tensor, "b 3 F H W"]:
    """Replace the last frames by the given ones.

    The first given frame is the last of the ``together`` frames of a latent frame; its difference
    to the sampled frame fades in over the others.
    """
    start = made.shape[2] - given.shape[2]
    missing = given[:, :, :1] - made[:, :, start : start + 1]
    made = made[:, :, :start].clone()
    for frame in range(1, together):
        made[:, :, start - together + frame] += frame / together * missing[:, :, 0]
    return torch.cat([made.clamp(-1, 1), given], dim=2)


def _decode(
    video_generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    chunk: int,
    known: KnownFrames,
    grid: TokenGrid,
    init: InitLatents | None = None,
) -> Float[Tensor, "b 3 F H W"]:
    # Each window has its own noise; that of the first is the seed's.
    own = [seed + (chunk << 32) for seed in seeds]
    return video_generator.tokenizer.decode(
        video_generator.latents(prompts, grid, own, known, init)
    )


def _chunks(given: int, wanted: int, step: int) -> range:
    """Number the windows that extend ``given`` frames to ``wanted``, each adding ``step``."""
    if wanted <= given:
        raise ValueError(f"{wanted} frames are asked for, and the video has {given} already")
    return range(-(-(wanted - given) // step))


def _empty(
    video_generator: VideoGenerator, like: Tensor, grid: TokenGrid
) -> Float[Tensor, "b c f h w"]:
    channels = video_generator.tokenizer.latent_channels
    return like.new_zeros(len(like), channels, grid.f, grid.h, grid.w)


def _frames_mask(
    latents: Float[Tensor, "b c f h w"], first: int = 0, last: int = 0
) -> Bool[Tensor, "b 1 f h w"]:
    mask = torch.zeros_like(latents[:, :1], dtype=torch.bool)
    mask[:, :, :first] = True
    mask[:, :, latents.shape[2] - last :] = True
    return mask


def _touched(
    repaint: Bool[Tensor, "b 1 F H W"], compression: Compression
) -> Bool[Tensor, "b 1 f h w"]:
    """Return the latent positions that hold a pixel of the mask."""
    p, q, r = compression.frames, compression.height, compression.width
    front = repeat(repaint[:, :, :1], "b c 1 H W -> b c n H W", n=p - 1)
    boxes = torch.cat([front, repaint], dim=2).float()
    return reduce(boxes, "b c (f p) (h q) (w r) -> b c f h w", "max", p=p, q=q, r=r) > 0


def _to_pixels(
    mask: Bool[Tensor, "b 1 f h w"], compression: Compression
) -> Bool[Tensor, "b 1 F H W"]:
    p, q, r = compression.frames, compression.height, compression.width
    return repeat(mask, "b c f h w -> b c (f p) (h q) (w r)", p=p, q=q, r=r)[:, :, p - 1 :]


def _size(video: Float[Tensor, "b 3 F H W"], num_frames: int | None = None) -> VideoSize:
    return VideoSize(num_frames or video.shape[2], video.shape[3], video.shape[4])
