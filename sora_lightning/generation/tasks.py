"""What a model trained on masks of known frames can do with videos: extend, connect, loop, inpaint,
edit, and go on for longer than it was trained.

The tokenizer is causal: a clip's first latent frame holds one frame, each later one
``compression.frames``. So context is counted in 1 + a multiple of that many frames; context at the
end of a clip is encoded by itself, and all but its first latent frame takes the place of the clip's
last. Latents there were trained with all the past before them, and have one frame of it here. The
first frame of that context closes a latent frame that is made, and is made with it: what it differs
by from the one given fades in over the frames that are made together with it. Then the last steps
are taken once more from what came of that (SDEdit, arXiv 2108.01073), as many as ``mend`` says: a
shape that stood a little beside its place has been there twice, and becomes one.
"""

from __future__ import annotations

import torch
from einops import reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.diffusion import Known
from sora_lightning.generation.generator import Draft, KnownFrames, VideoGenerator
from sora_lightning.types import Compression, TokenGrid, VideoSize

MEND = 0.3
"""Share of the sampler's steps that go once more over a video that leads to given frames."""


def extend(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    num_frames: int,
    window: int,
    context: int,
    noise: float = 0.0,
) -> Float[Tensor, "b 3 _G H W"]:
    """A video and what comes after it, ``num_frames`` in all, made in windows.

    Each window of ``window`` frames begins with the last ``context`` frames there are. ``noise`` is
    the time at which the network sees them. Frames before the first context are returned as given,
    those of a context as the tokenizer gives them back.
    """
    grid = _window(generator, video, window, context)
    head = generator.tokenizer.compression.grid(_size(video, context)).f
    for chunk in _chunks(video.shape[2], num_frames, window - context):
        latents = _empty(generator, video, grid)
        latents[:, :, :head] = generator.tokenizer.encode(video[:, :, -context:])
        known = KnownFrames(latents, _frames_mask(latents, first=head), noise)
        made = _decode(generator, prompts, seeds, chunk, known, grid)
        video = torch.cat([video[:, :, :-context], made], dim=2)
    return video[:, :, :num_frames]


def extend_backward(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    num_frames: int,
    window: int,
    context: int,
    noise: float = 0.0,
    mend: float = MEND,
) -> Float[Tensor, "b 3 _G H W"]:
    """What comes before a video and the video, ``num_frames`` in all: each window ends with the
    first ``context`` frames there are. See ``extend``.
    """
    grid = _window(generator, video, window, context)
    for chunk in _chunks(video.shape[2], num_frames, window - context):
        latents, tail, given = _place_end(generator, video[:, :, :context], grid)
        known = KnownFrames(latents, _frames_mask(latents, last=tail), noise)
        made = _decode_to(generator, prompts, seeds, chunk, known, given, mend)
        video = torch.cat([made, video[:, :, context:]], dim=2)
    return video[:, :, -num_frames:]


def connect(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    first: Float[Tensor, "b 3 F H W"],
    second: Float[Tensor, "b 3 G H W"],
    window: int,
    context: int,
    noise: float = 0.0,
    mend: float = MEND,
) -> Float[Tensor, "b 3 _I H W"]:
    """One video that begins as the first and ends as the second: between them stand
    ``window - 2 context`` new frames, made with ``context`` frames of each in sight.
    """
    bridge = _bridge(generator, prompts, seeds, (first, second), window, context, noise, mend)
    return torch.cat([first[:, :, :-context], bridge, second[:, :, context:]], dim=2)


def loop(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    window: int,
    context: int,
    noise: float = 0.0,
    mend: float = MEND,
) -> Float[Tensor, "b 3 _G H W"]:
    """A video whose last frame leads to its first: ``window - 2 context`` new frames follow it.

    The first and the last ``context`` frames come back as the tokenizer gives them; of frames that
    are both, as the first.
    """
    bridge = _bridge(generator, prompts, seeds, (video, video), window, context, noise, mend)
    start, end, new = (
        bridge[:, :, -context:],
        bridge[:, :, :context],
        bridge[:, :, context:-context],
    )
    num_middle = video.shape[2] - 2 * context
    middle = video[:, :, context : context + max(num_middle, 0)]
    return torch.cat([start, middle, end[:, :, max(-num_middle, 0) :], new], dim=2)


def inpaint(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    repaint: Bool[Tensor, "b 1 F H W"],
    noise: float = 0.0,
) -> Float[Tensor, "b 3 F H W"]:
    """The video with the masked pixels made anew. A token is made anew where any of its pixels is;
    the others are as the tokenizer gives them back.
    """
    if repaint.shape != video[:, :1].shape:
        raise ValueError(
            f"a mask of {tuple(repaint.shape[2:])} for a video of {tuple(video.shape[2:])}: both "
            "must have the same frames, rows and columns"
        )
    compression = generator.tokenizer.compression
    grid = compression.grid(_size(video))
    latents = generator.tokenizer.encode(video)
    whole = Known.of(~_touched(repaint, compression), generator.denoiser.patch)
    known = KnownFrames(latents, whole.mask, noise)
    made = _decode(generator, prompts, seeds, 0, known, grid)
    kept = _to_pixels(known.mask, compression).to(made.device)
    return torch.where(kept, generator.tokenizer.decode(latents), made)


def edit(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    strength: float,
    sources: list[str] | None = None,
    source_guidance: float = 2.0,
) -> Float[Tensor, "b 3 F H W"]:
    """The video as the prompt says, from the video with noise on it (SDEdit, arXiv 2108.01073):
    the more ``strength``, the less of it is left.

    With ``sources``, what the video shows now, only what the prompts differ in is to change
    (FlowEdit, arXiv 2412.08629), and ``source_guidance`` is their weight.
    """
    grid = generator.tokenizer.compression.grid(_size(video))
    draft = Draft(generator.tokenizer.encode(video), strength)
    if sources is not None:
        edited = generator.edited(prompts, sources, seeds, draft, source_guidance)
        return generator.tokenizer.decode(edited)
    return generator.tokenizer.decode(generator.latents(prompts, grid, seeds, draft=draft))


def instruct(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    video: Float[Tensor, "b 3 F H W"],
    noise: float = 0.0,
) -> Float[Tensor, "b 3 F H W"]:
    """The video as the prompts ask to change it, by a model trained with the task ``Source``
    (InstructPix2Pix, arXiv 2211.09800). The generator's ``frame_guidance`` is the weight of the
    video, its ``guidance_scale`` that of the instruction.
    """
    latents = generator.tokenizer.encode(video)
    whole = torch.ones_like(latents[:, :1], dtype=torch.bool)
    source = KnownFrames(latents, whole, noise, keep=False)
    grid = generator.tokenizer.compression.grid(_size(video))
    return _decode(generator, prompts, seeds, 0, source, grid)


def _bridge(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    ends: tuple[Tensor, Tensor],
    window: int,
    context: int,
    noise: float,
    mend: float,
) -> Float[Tensor, "b 3 _window H W"]:
    """A window that begins with the last frames of one video and ends with the first of another."""
    first, second = ends
    if first.shape[3:] != second.shape[3:]:
        raise ValueError(f"videos of {_size(first)} and {_size(second)}: must be of one size")
    _window(generator, second, window, context)
    grid = _window(generator, first, window, context, both_ends=True)
    latents, tail, given = _place_end(generator, second[:, :, :context], grid)
    begin = generator.tokenizer.encode(first[:, :, -context:])
    head = begin.shape[2]
    latents[:, :, :head] = begin
    known = KnownFrames(latents, _frames_mask(latents, head, tail), noise)
    return _decode_to(generator, prompts, seeds, 0, known, given, mend)


def _window(
    generator: VideoGenerator,
    video: Float[Tensor, "b 3 F H W"],
    window: int,
    context: int,
    both_ends: bool = False,
) -> TokenGrid:
    """The latent grid of a window. ``ValueError`` for numbers of frames that do not fit."""
    compression, patch = generator.tokenizer.compression, generator.denoiser.patch
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
            f"the denoiser's tokens hold {patch.f} latent frames, and known frames are told apart "
            "one by one: the patch must be 1 in time"
        )
    return grid


def _place_end(
    generator: VideoGenerator, frames: Float[Tensor, "b 3 k H W"], grid: TokenGrid
) -> tuple[Float[Tensor, "b c f h w"], int, Float[Tensor, "b 3 k H W"]]:
    """Latents with the frames at their end, how many latent frames these are, and the frames as the
    tokenizer gives them back. ``ValueError`` for a single frame, which is no later latent frame.
    """
    encoded = generator.tokenizer.encode(frames)
    tail = encoded.shape[2] - 1
    if not tail:
        step = generator.tokenizer.compression.frames
        raise ValueError(
            f"context = 1 frame: at the end of a clip a latent frame holds {step} frames, so the "
            f"context must be 1 + a multiple of {step}, at least {1 + step}"
        )
    latents = _empty(generator, frames, grid)
    latents[:, :, -tail:] = encoded[:, :, 1:]
    return latents, tail, generator.tokenizer.decode(encoded)


def _decode_to(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    chunk: int,
    known: KnownFrames,
    given: Float[Tensor, "b 3 k H W"],
    mend: float,
) -> Float[Tensor, "b 3 F H W"]:
    """A window that leads to the given frames, which are its last."""
    if not 0 <= mend <= 1:
        raise ValueError(f"mend = {mend}: must lie in [0, 1]")
    tokenizer = generator.tokenizer
    together, grid = tokenizer.compression.frames, TokenGrid(*known.latents.shape[2:])
    made = _decode(generator, prompts, seeds, chunk, known, grid)
    video = _leading_to(made, given, together)
    if not mend:
        return video
    draft = Draft(tokenizer.encode(video), mend)
    made = _decode(generator, prompts, seeds, chunk, known, grid, draft)
    return _leading_to(made, given, together)


def _leading_to(
    made: Float[Tensor, "b 3 F H W"], given: Float[Tensor, "b 3 k H W"], together: int
) -> Float[Tensor, "b 3 F H W"]:
    """The video with the given frames as its last. Of ``together`` frames of one latent frame the
    last is the first that is given: the others lead to it.
    """
    start = made.shape[2] - given.shape[2]
    missing = given[:, :, :1] - made[:, :, start : start + 1]
    made = made[:, :, :start].clone()
    for frame in range(1, together):
        made[:, :, start - together + frame] += frame / together * missing[:, :, 0]
    return torch.cat([made.clamp(-1, 1), given], dim=2)


def _decode(
    generator: VideoGenerator,
    prompts: list[str],
    seeds: list[int],
    chunk: int,
    known: KnownFrames,
    grid: TokenGrid,
    draft: Draft | None = None,
) -> Float[Tensor, "b 3 F H W"]:
    # Every window has noise of its own, the first that of the seed.
    own = [seed + (chunk << 32) for seed in seeds]
    return generator.tokenizer.decode(generator.latents(prompts, grid, own, known, draft))


def _chunks(given: int, wanted: int, step: int) -> range:
    """The windows that bring ``given`` frames up to ``wanted``, each adding ``step``."""
    if wanted <= given:
        raise ValueError(f"{wanted} frames are asked for, and the video has {given} already")
    return range(-(-(wanted - given) // step))


def _empty(generator: VideoGenerator, like: Tensor, grid: TokenGrid) -> Float[Tensor, "b c f h w"]:
    channels = generator.tokenizer.latent_channels
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
    """Which latent positions hold a pixel of the mask."""
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
