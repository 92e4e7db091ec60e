"""Known frames come back as they went in, in every task, whatever the network says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sora_lightning.conditioning import (
    BothEnds,
    FirstFrames,
    Inpainting,
    LastFrames,
    TextConditioner,
    TextToVideo,
    TimeZeroConditioning,
)
from sora_lightning.conditioning.masks import NUM_UNIFORMS, draw_known
from sora_lightning.denoisers import DiT
from sora_lightning.diffusion import (
    DDIM,
    DDPM,
    Epsilon,
    Preconditioned,
    Process,
    UniPC,
    V,
    VarianceExploding,
    VariancePreserving,
    dpm_solver,
    euler,
    heun,
)
from sora_lightning.generation import (
    SAMPLERS,
    GuidanceConfig,
    InitLatents,
    KnownFrames,
    SamplingConfig,
    VideoGenerator,
    connect,
    edit,
    extend,
    extend_backward,
    inpaint,
    loop,
)
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import TokenGrid, VideoSize

PROMPTS, SEEDS = ["a red circle", "a blue square"], [3, 4]
VP = VariancePreserving()


@pytest.fixture(scope="module")
def video_generator() -> VideoGenerator:
    """A network that has not been trained, made to say something all the same."""
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(
        4, [8, 16], down_time=[True], down_space=[True], patch=4, blocks_per_level=1
    )
    conditioner = TextConditioner(width=16, depth=1, num_heads=2)
    denoiser = DiT(4, 16, size=TransformerSize(1, 24, 2), patch=(1, 1, 1))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    parts = [part.eval().requires_grad_(False) for part in (tokenizer, conditioner, denoiser)]
    return VideoGenerator(*parts, sampling=SamplingConfig(num_steps=4))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 9, 16, 16, generator=generator) * 2 - 1


def sampled_with(video_generator: VideoGenerator, **changes: object) -> VideoGenerator:
    return replace(video_generator, sampling=replace(video_generator.sampling, **changes))


def given_back(video_generator: VideoGenerator, frames: torch.Tensor) -> torch.Tensor:
    return video_generator.tokenizer.decode(video_generator.tokenizer.encode(frames))


def assert_same(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


def test_an_extension_goes_on_from_the_last_frames(video_generator, video):
    longer = extend(video_generator, PROMPTS, SEEDS, video, 21, window=9, context=5)
    assert longer.shape[2] == 21  # three windows, each adding four
    assert torch.equal(longer[:, :, :4], video[:, :, :4])
    once = extend(video_generator, PROMPTS, SEEDS, video, 13, window=9, context=5)
    assert_same(once[:, :, 4:9], given_back(video_generator, video[:, :, 4:9]))
    assert_same(once[:, :, :8], longer[:, :, :8])
    other = extend(video_generator, PROMPTS, [5, 6], video, 13, window=9, context=5)
    assert (other[:, :, 9:] - once[:, :, 9:]).abs().max() > 0.01


def test_a_still_image_is_extended_too(video_generator, video):
    made = extend(video_generator, PROMPTS, SEEDS, video[:, :, :1], 9, window=9, context=1)
    assert made.shape[2] == 9
    assert_same(made[:, :, :1], given_back(video_generator, video[:, :, :1]))


def test_an_extension_backward_ends_with_the_first_frames(video_generator, video):
    longer = extend_backward(video_generator, PROMPTS, SEEDS, video, 17, window=9, context=3)
    assert longer.shape[2] == 17
    assert torch.equal(longer[:, :, -6:], video[:, :, 3:])
    once = extend_backward(video_generator, PROMPTS, SEEDS, video, 15, window=9, context=3)
    assert_same(once[:, :, 6:9], given_back(video_generator, video[:, :, :3]))


def test_a_connection_begins_as_the_first_and_ends_as_the_second(video_generator, video):
    second = video.flip(2)
    made = connect(video_generator, PROMPTS, SEEDS, video, second, window=9, context=3)
    assert made.shape[2] == 9 + 9 + 3
    assert torch.equal(made[:, :, :6], video[:, :, :6])
    assert torch.equal(made[:, :, -6:], second[:, :, 3:])
    assert_same(made[:, :, 6:9], given_back(video_generator, video[:, :, -3:]))
    assert_same(made[:, :, 12:15], given_back(video_generator, second[:, :, :3]))


def test_the_last_made_frames_lead_to_the_given_ones(video_generator, monkeypatch):
    """The first given frame closes a latent frame of four: what it differs by from the one made
    there comes in by quarters, so that the step across the seam is a quarter off and no more.
    """
    tokenizer = ConvTokenizer(4, [8] * 3, [True] * 2, [True, False], patch=4, blocks_per_level=1)
    video_generator = replace(video_generator, tokenizer=tokenizer.eval().requires_grad_(False))
    decoded: list[torch.Tensor] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        decoded.append(ConvTokenizer.decode(tokenizer, latents))
        return decoded[-1]

    monkeypatch.setattr(tokenizer, "decode", decode)
    first, second = torch.rand(2, 2, 3, 5, 16, 16).mul(2).sub(1).unbind()
    once = sampled_with(video_generator, resample_strength=0.0)
    out = connect(once, PROMPTS, SEEDS, first, second, window=17, context=5)
    given, made = decoded
    missing = given[:, :, 0] - made[:, :, 12]
    assert missing.abs().max() > 0.05
    for frame, share in enumerate([0, 0.25, 0.5, 0.75], start=8):
        expected = (made[:, :, frame] + share * missing).clamp(-1, 1)
        torch.testing.assert_close(out[:, :, frame], expected)
    assert torch.equal(out[:, :, 12:], given)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_join_is_resampled_from_its_first_result(video_generator, video, strength):
    """The last steps again, from the joined video: all of them forget it, since the noise is the
    same.
    """

    def join(strength: float) -> torch.Tensor:
        model = sampled_with(video_generator, resample_strength=strength)
        return connect(model, PROMPTS, SEEDS, video, video.flip(2), window=9, context=3)

    rough, resampled = join(0.0), join(strength)
    assert_same(resampled[:, :, :9], rough[:, :, :9])
    assert_same(resampled[:, :, 12:], rough[:, :, 12:])
    change = (resampled[:, :, 9:12] - rough[:, :, 9:12]).abs().max()
    assert change < 1e-4 if strength == 1 else change > 0.01
    with pytest.raises(ValueError, match=r"resample_strength = 1\.5: must lie in \[0, 1\]"):
        join(1.5)


def test_a_loop_is_the_video_and_the_way_back_to_its_start(video_generator, video):
    made = loop(video_generator, PROMPTS, SEEDS, video, window=9, context=3)
    assert made.shape[2] == 9 + 3
    assert_same(made[:, :, :3], given_back(video_generator, video[:, :, :3]))
    assert torch.equal(made[:, :, 3:6], video[:, :, 3:6])
    assert_same(made[:, :, 6:9], given_back(video_generator, video[:, :, -3:]))


@pytest.mark.parametrize("num_frames", [3, 4, 5, 6, 7])
def test_a_loop_of_a_short_video_has_each_frame_once(video_generator, video, num_frames):
    """Also where a frame is both among the first and among the last that are seen."""
    short = video[:, :, :num_frames]
    made = loop(video_generator, PROMPTS, SEEDS, short, window=9, context=3)
    assert made.shape[2] == num_frames + 3
    assert_same(made[:, :, :3], given_back(video_generator, short[:, :, :3]))
    if num_frames > 3:
        end = given_back(video_generator, short[:, :, -3:])
        num_new = min(3, num_frames - 3)
        assert_same(made[:, :, num_frames - num_new : num_frames], end[:, :, 3 - num_new :])


def test_inpainting_leaves_what_the_mask_leaves(video_generator, video):
    repaint = torch.zeros(2, 1, 9, 16, 16, dtype=torch.bool)
    repaint[:, :, 4, 3, 12] = True  # one pixel: its whole token, frames 3 and 4
    made = inpaint(video_generator, PROMPTS, SEEDS, video, repaint)
    tokens = torch.zeros_like(repaint)
    tokens[:, :, 3:5, 0:8, 8:16] = True
    original = given_back(video_generator, video)
    kept = ~tokens.expand_as(made)
    assert_same(made[kept], original[kept])
    assert ((made - original).abs() > 0.01)[~kept].float().mean() > 0.5


def test_an_edit_keeps_less_the_stronger_it_is(video_generator, video):
    original = given_back(video_generator, video)
    changes = []
    for strength in (0.25, 0.5, 1.0):
        made = edit(video_generator, PROMPTS, SEEDS, video, strength)
        changes.append((made - original).square().mean().item())
    assert changes[0] < changes[1] < changes[2]
    # Nothing is left at full strength: it is the video of the prompt alone.
    alone = video_generator.videos(PROMPTS, VideoSize(9, 16, 16), SEEDS)
    assert_same(made, alone)


def test_an_edit_by_two_prompts_changes_nothing_where_they_are_one(video_generator, video):
    same = edit(video_generator, PROMPTS, SEEDS, video, 0.8, PROMPTS, source_guidance=2.0)
    assert_same(same, given_back(video_generator, video))
    other = edit(video_generator, PROMPTS[::-1], SEEDS, video, 0.8, PROMPTS, source_guidance=2.0)
    assert (other - same).abs().max() > 1e-3
    with pytest.raises(ValueError, match="is for a RectifiedFlow"):
        edit(
            replace(video_generator, process=Process(VP, Epsilon())),
            PROMPTS,
            SEEDS,
            video,
            0.8,
            PROMPTS,
        )


@pytest.mark.parametrize(
    "sampler", [euler, heun, DDIM(0.5), DDPM(), dpm_solver, UniPC(2)], ids=lambda s: str(s)[:20]
)
@pytest.mark.parametrize(
    "process",
    [Process(), Process(VP, Epsilon()), Process(VarianceExploding(), Preconditioned())],
    ids=["flow", "preserving", "exploding"],
)
def test_every_sampler_moves_straight_to_what_is_known(
    video_generator, monkeypatch, sampler, process
):
    """Before the known latents are put back in the end, too."""
    if isinstance(sampler, DDPM) and process == Process():
        pytest.skip("DDPM has no step from where nothing of the data is left")
    grid = TokenGrid(3, 2, 2)
    latents = torch.randn(2, 4, 3, 2, 2)
    mask = torch.zeros(2, 1, 3, 2, 2, dtype=torch.bool)
    mask[:, :, 1, :, 0] = True
    reached: list[torch.Tensor] = []

    def spy(*arguments):
        reached.append(sampler(*arguments))
        return reached[0]

    monkeypatch.setitem(SAMPLERS, "euler", spy)
    guidance = GuidanceConfig(frame_guidance=1.5)
    model = sampled_with(replace(video_generator, process=process), guidance=guidance)
    made = model.latents(PROMPTS, grid, SEEDS, KnownFrames(latents, mask))
    kept = mask.expand_as(latents)
    torch.testing.assert_close(reached[0][kept], latents[kept], rtol=1e-3, atol=1e-3)
    assert torch.equal(made[kept], latents[kept])


def test_frame_guidance_of_one_is_the_model_told_the_frames(video_generator, video):
    latents = torch.randn(2, 4, 3, 2, 2)
    mask = torch.zeros(2, 1, 3, 2, 2, dtype=torch.bool)
    mask[:, :, 0] = True
    known = KnownFrames(latents, mask)
    grid = TokenGrid(3, 2, 2)
    plain = video_generator.latents(PROMPTS, grid, SEEDS, known)
    weighed = {
        scale: sampled_with(video_generator, guidance=GuidanceConfig(frame_guidance=scale)).latents(
            PROMPTS, grid, SEEDS, known
        )
        for scale in (1.0, 3.0)
    }
    torch.testing.assert_close(weighed[1.0], plain, rtol=1e-3, atol=1e-3)
    assert (weighed[3.0] - plain).abs().max() > 1e-3


def test_noise_on_known_frames_changes_what_is_made_and_not_what_is_known(video_generator, video):
    arguments = (PROMPTS, SEEDS, video, 13, 9, 5)
    clean = extend(video_generator, *arguments)
    noisy = extend(sampled_with(video_generator, frame_noise=0.3), *arguments)
    assert_same(noisy[:, :, :9], clean[:, :, :9])
    assert (noisy[:, :, 9:] - clean[:, :, 9:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g, v: extend(g, PROMPTS, SEEDS, v, 13, 9, 4), "1 \\+ a multiple of 2"),
        (lambda g, v: extend(g, PROMPTS, SEEDS, v, 13, 9, 9), "leave nothing to make"),
        (lambda g, v: extend(g, PROMPTS, SEEDS, v, 9, 9, 5), "has 9 already"),
        (lambda g, v: extend(g, PROMPTS, SEEDS, v[:, :, :3], 9, 9, 5), "shorter than the context"),
        (lambda g, v: extend_backward(g, PROMPTS, SEEDS, v, 13, 9, 1), "at least 3"),
        (lambda g, v: connect(g, PROMPTS, SEEDS, v, v, 9, 5), "at both ends leave nothing"),
        (lambda g, v: connect(g, PROMPTS, SEEDS, v, v[..., :8], 9, 3), "must be of one size"),
        (lambda g, v: loop(g, PROMPTS, SEEDS, v[:, :, :2], 9, 3), "shorter than the context"),
        (lambda g, v: edit(g, PROMPTS, SEEDS, v, 0.0), "strength = 0.0"),
        (lambda g, v: KnownFrames(v, v[:, :1] > 0, noise=1.0), "noise = 1.0"),
        (lambda g, v: SamplingConfig(frame_noise=1.0), "frame_noise = 1.0"),
        (lambda g, v: extend(g, PROMPTS, [1], v, 13, 9, 5), "1 seeds"),
        (lambda g, v: inpaint(g, PROMPTS, SEEDS, v, v[:, :1, :5] > 0), "both must have the same"),
        (lambda g, v: InitLatents(v, 1.5), "strength = 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(video_generator, video, call, said):
    with pytest.raises(ValueError, match=said):
        call(video_generator, video)


@pytest.mark.parametrize("f", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "task", [FirstFrames(), LastFrames(), BothEnds(), Inpainting(), FirstFrames(most=1)], ids=str
)
def test_a_mask_knows_some_and_never_all(task, f):
    grid = TokenGrid(f, 3, 2)
    counts = set()
    for uniforms in torch.rand(60, 6).tolist():
        known = task.known(grid, uniforms)
        assert not known.all()
        counts.add(int(known.flatten(1).all(1).sum()))
    if isinstance(task, FirstFrames) and f > 1:
        assert counts == {1} if task.most else counts == set(range(1, f))
    if isinstance(task, BothEnds) and f > 2:
        assert known[0].all()
        assert known[-1].all()


def test_a_mixture_draws_each_task_by_its_weight():
    tasks = [TextToVideo(weight=3), FirstFrames(weight=1, most=1, noise=0.2)]
    x_0, uniforms = torch.zeros(4000, 1, 3, 4, 4), torch.rand(4000, NUM_UNIFORMS)
    known = draw_known(tasks, Patch(1, 2, 2), x_0, uniforms)
    masks, t = known.mask, known.t
    assert masks.shape == (4000, 1, 3, 4, 4)
    first = masks[:, 0, 0, 0, 0]
    assert abs(first.float().mean() - 0.25) < 0.03
    assert not masks[:, :, 1:].any()
    assert (t[~first] == 0).all()
    assert 0.18 < t[first].max() < 0.2
    for tasks in ([TextToVideo(weight=0.0)],):
        with pytest.raises(ValueError, match="must not all be 0"):
            TimeZeroConditioning(tasks)
    with pytest.raises(ValueError, match="weight = -1"):
        FirstFrames(weight=-1.0)
    with pytest.raises(ValueError, match=r"noise = 1\.0"):
        FirstFrames(noise=1.0)


def test_v_is_a_prediction_of_the_flow_too(video_generator):
    model = replace(video_generator, process=Process(prediction=V()))
    assert torch.isfinite(model.videos(PROMPTS, VideoSize(5, 16, 16), SEEDS)).all()
