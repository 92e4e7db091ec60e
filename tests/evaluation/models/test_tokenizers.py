"""Evaluation of a tokenizer: baselines that keep to their budget, probes that find what they look
for, and the whole way from a checkpoint to a report.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evaluation.__main__ import main
from evaluation.models.tokenizers.baselines import (
    _encode,
    bicubic_in_space,
    bicubic_in_space_and_time,
    h264,
)
from evaluation.models.tokenizers.distances import distances, flicker_error, summary
from evaluation.models.tokenizers.probes import (
    bits_per_channel,
    causality,
    quantised,
    seams,
    tile_seams,
)
from evaluation.models.tokenizers.run import RebuiltClip, TokenizerRequest, _rfvd
from sora_lightning.cli.training import run_training
from sora_lightning.data.synthetic.render import write_dataset
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian


@pytest.fixture(scope="module")
def moving():
    """A bright disc that crosses a gradient, 9 frames of 32 x 48."""
    rows, columns = np.mgrid[:32, :48]
    video = np.zeros((9, 32, 48, 3), dtype=np.uint8)
    for number, frame in enumerate(video):
        frame[..., 0] = 4 * columns + 20
        frame[..., 1] = 6 * rows
        frame[np.hypot(rows - 16, columns - 5 * number - 4) < 6] = (250, 240, 30)
    return video


def error(video, other):
    return np.square(video.astype(float) - other).mean()


@pytest.mark.parametrize("number", [600, 3000, 20_000])
def test_bicubic_keeps_to_its_number_of_values_and_uses_it(moving, number):
    space = bicubic_in_space(moving, number)
    both = bicubic_in_space_and_time(moving, number)
    assert space.video.shape == both.video.shape == moving.shape
    assert 0.7 * number < space.size <= number
    assert both.size <= number
    # Keeping every frame is one of the ways it tries.
    assert error(moving, both.video) <= error(moving, space.video)


def test_bicubic_loses_nothing_where_there_are_values_enough(moving):
    assert np.array_equal(bicubic_in_space(moving, moving.size).video, moving)
    still = np.repeat(moving[:1], 9, axis=0)
    kept = bicubic_in_space_and_time(still, moving[0].size)
    assert np.array_equal(kept.video, still)  # one frame, whole
    assert kept.setting.startswith("1x")


def test_h264_keeps_to_its_bytes_and_more_bytes_are_better(moving):
    few, many = h264(moving, 900, 8.0), h264(moving, 6000, 8.0)
    assert few.size <= 900
    assert 900 < many.size <= 6000
    assert few.video.shape == many.video.shape == moving.shape
    assert error(moving, many.video) < error(moving, few.video) < 1500
    assert error(moving, many.video) < 30
    with pytest.raises(ValueError, match="10 bytes are too few"):
        h264(moving, 10, 8.0)


def test_flicker_error_sees_what_moves_and_not_what_stands_still():
    real = torch.full((1, 3, 4, 16, 16), 100, dtype=torch.uint8)
    still, flickering = real + 10, real.clone()
    flickering[:, :, ::2] += 51
    assert flicker_error(real, still) == 0
    assert flicker_error(real, flickering) == pytest.approx(0.2)


def test_the_summary_pairs_clip_by_clip(moving):
    noisy = moving.copy()
    noisy[..., 0] -= 10
    real = [moving, moving, moving[:1]]
    values = {
        "tokenizer": distances(real, [moving, noisy, moving[:1]], None),
        "bicubic": distances(real, [noisy, noisy, noisy[:1]], None),
    }
    scores = summary(values, ["9x32x48", "9x32x48", "1x32x48"], seed=0)
    of_noise = 10 * np.log10(255**2 * 3 / 100)
    assert scores["bicubic/psnr"].value == pytest.approx(of_noise)
    gain = 100 - of_noise
    assert scores["tokenizer/gain_over_bicubic"].value == pytest.approx(2 * gain / 3)
    assert scores["tokenizer/gain_over_bicubic/9x32x48"].value == pytest.approx(gain / 2)
    assert scores["tokenizer/gain_over_bicubic/1x32x48"].n == 1
    assert scores["tokenizer/flicker_error"].n == 2  # one frame does not flicker


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    built = ConvTokenizer(
        latent_channels=4, widths=(8, 16), down_time=(True,), down_space=(True,), blocks_per_level=1
    )
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built.eval().requires_grad_(False)


def test_causality_and_pieces_of_the_causal_tokenizer(tokenizer):
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    found = causality(tokenizer, video)
    assert found.latents < 1e-5
    assert found.pixels < 1e-2
    assert found.control > 1e-2
    latents, pixels = seams(tokenizer, video)
    assert latents < 1e-5
    assert pixels < 1e-2


class Brighter(ConvTokenizer):
    """Adds a brightness that depends on how much of the frame it sees."""

    def decode_step(self, latents, past):
        pixels, past = super().decode_step(latents, past)
        return pixels + 2 / latents.shape[-1], past


def test_a_shift_of_colour_between_tiles_is_found(tokenizer):
    brighter = Brighter(
        latent_channels=4, widths=(8, 16), down_time=(True,), down_space=(True,), blocks_per_level=1
    )
    brighter.load_state_dict(tokenizer.state_dict())
    video = torch.rand(1, 3, 3, 24, 24) * 2 - 1
    with torch.no_grad():
        assert max(tile_seams(brighter, video[..., :12, :12])) == 0  # a single tile
        pixels, colour = tile_seams(tokenizer, video)
        worse, shifted = tile_seams(brighter, video)
    assert worse > pixels
    assert shifted > colour + 2


class Seer(ConvTokenizer):
    """Adds to every latent the mean of its channel over the whole clip, or piece."""

    def posterior_step(self, video, past):
        posterior, past = super().posterior_step(video, past)
        mean = posterior.mean + posterior.mean.mean(dim=2, keepdim=True)
        return DiagonalGaussian(mean, posterior.log_variance), past

    def decode_step(self, latents, past):
        return super().decode_step(latents + latents.mean(dim=2, keepdim=True), past)


def test_a_tokenizer_that_sees_the_future_is_found_out(tokenizer):
    seer = Seer(
        latent_channels=4, widths=(8, 16), down_time=(True,), down_space=(True,), blocks_per_level=1
    )
    seer.load_state_dict(tokenizer.state_dict())
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    with torch.no_grad():
        found = causality(seer, video)
        latents, pixels = seams(seer, video)
    assert min(found.latents, latents) > 1e-3
    assert min(found.pixels, pixels) > 0.1


class Stub:
    """Posteriors of a given deviation: channel 0 says 3 bits, 1 nothing, 2 is drowned in noise."""

    def posterior(self, video):
        signal = torch.randn(1, 3, 4, 40, 40, generator=torch.Generator().manual_seed(0))
        mean = signal * torch.tensor([63**0.5, 0.0, 0.1])[:, None, None, None]
        return DiagonalGaussian(mean, torch.zeros_like(mean))


def test_bits_of_a_gaussian_channel():
    bits = bits_per_channel(Stub(), [torch.zeros(1)])
    torch.testing.assert_close(bits[0], torch.tensor(3.0, dtype=torch.float64), atol=0.05, rtol=0)
    assert bits[1] == 0
    assert 0 < bits[2] < 0.02


def test_latents_in_8_bits_are_within_half_a_step():
    latents = torch.randn(1, 5, 3, 8, 8) * torch.tensor([1, 2, 3, 4, 0.0])[:, None, None, None]
    coarse, num_bytes = quantised(latents)
    assert num_bytes == latents.numel() + 20
    spread = latents.amax((2, 3, 4), keepdim=True) - latents.amin((2, 3, 4), keepdim=True)
    # The bounds themselves are rounded to half precision.
    assert ((coarse - latents).abs() <= spread / 255 / 2 + 4e-3 * latents.abs().max()).all()
    assert len(coarse[0, 0].unique()) <= 256


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training of two steps on rendered clips, and clips that it did not see."""
    folder = tmp_path_factory.mktemp("run")
    write_dataset(folder / "clips", num_train=4, num_val=2, num_test=0, num_workers=1)
    config = {
        "run_dir": str(folder / "run"),
        "model": {
            "class_path": "sora_lightning.systems.TokenizerSystem",
            "init_args": {
                "tokenizer": {
                    "class_path": "sora_lightning.tokenizers.ConvTokenizer",
                    "init_args": {
                        "latent_channels": 6,
                        "widths": [8, 16],
                        "down_time": [True],
                        "down_space": [True],
                        "patch": 4,
                        "linear_tubelets": True,
                    },
                }
            },
        },
        "data": {
            "manifest": str(folder / "clips/train.jsonl"),
            "val_manifest": str(folder / "clips/val.jsonl"),
            "fps": 8,
            "batching": {"sizes": ["5x32x32", "5x24x32"], "pixels_per_batch": 20000},
        },
        "trainer": {"logger": False, "max_steps": 2, "accelerator": "cpu"},
    }
    (folder / "experiment.json").write_text(json.dumps(config))
    run_training(["fit", "--config", str(folder / "experiment.json")])
    return folder / "run"


def test_a_checkpoint_of_a_tokenizer_is_evaluated_by_the_plain_command(run, capsys):
    checkpoint = run / "checkpoints/last.ckpt"
    assert main(["--checkpoint", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert "tokenizer/psnr" in said
    assert "left out: lpips" in said
    assert "left out: rfvd: needs" in said
    report = json.loads((run / "report/report.json").read_text())
    ways = ("tokenizer", "unquantised", "bicubic", "bicubic_time", "h264")
    for way in ways:
        for name in ("psnr", "ssim", "flicker", "flicker_error"):
            assert f"{way}/{name}" in report["scores"]
    assert report["scores"]["tokenizer/causality/pixels"] < 1e-2
    assert report["scores"]["tokenizer/seams/pixels"] < 1e-2
    assert report["settings"]["num_videos"] == 2
    first = report["videos"][0]
    assert first["bytes"] == first["values"] + 4 * 6
    page = (run / "report/report.html").read_text()
    assert "H.264 in as many bytes" in page
    strip = Image.open(run / "report/strip.png")
    assert strip.height > 5 * 128


def test_rfvd_of_enough_clips_by_the_network_in_its_name(run, dataset, networks, tmp_path, capsys):
    """As many clips of one size as the protocol asks for; others are left out of it and not of the
    rest.
    """
    arguments = ["--checkpoint", run / "checkpoints/last.ckpt", "--reference", dataset["val"]]
    arguments += ["--sizes", "5x32x32", "--networks", networks, "--output", tmp_path]
    assert main([str(part) for part in arguments]) == 0
    assert "rfvd: needs" not in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    scores, details = report["scores"], report["details"]
    assert {f"tokenizer/rfvd-tiny{part}" for part in ("", "/half", "/floor", "/infinity")} <= (
        scores.keys()
    )
    assert not {"rfvd", "tokenizer/rfvd", "tokenizer/rfvd-i3d"} & scores.keys()
    assert scores["tokenizer/rfvd-tiny"] > 0
    assert details["tokenizer/rfvd-tiny"]["n"] == 8
    assert details["tokenizer/rfvd-tiny"]["low"] <= scores["tokenizer/rfvd-tiny"]
    assert report["settings"]["networks"]["videos"]["sha256"]


def clips_of(videos, rebuilt):
    return [
        RebuiltClip(str(i), "", torch.zeros(1), real, {"tokenizer": other}, {})
        for i, (real, other) in enumerate(zip(videos, rebuilt, strict=True))
    ]


def test_rfvd_is_0_for_what_is_not_changed_and_grows_with_what_is(networks, protocol, tmp_path):
    draw = np.random.default_rng(0)
    videos = [draw.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8) // 2 for _ in range(9)]
    videos[8] = videos[8][:, :24]  # of another size: left out
    request = TokenizerRequest(
        tmp_path, tmp_path, ("5x32x32",), 8.0, tmp_path, tmp_path, protocol, networks
    )

    def rfvd(rebuilt):
        scores, networks, left_out = _rfvd(request, clips_of(videos, rebuilt))
        assert not left_out
        assert networks["videos"]["sha256"]
        assert scores["tokenizer/rfvd-tiny"].n == 8
        return scores["tokenizer/rfvd-tiny"].value

    assert rfvd(videos) == pytest.approx(0, abs=1e-9)
    slightly, greatly = ([video + shift for video in videos] for shift in (10, 100))
    assert 0 < rfvd(slightly) < rfvd(greatly)
    _, _, left_out = _rfvd(request, clips_of(videos[1:], videos[1:]))
    assert left_out == ["rfvd: needs 8 clips of one size, and 5x32x32 has 7"]


def test_what_is_missing_or_wrong_is_said(run, tmp_path, capsys):
    checkpoint = str(run / "checkpoints/last.ckpt")
    lonely = tmp_path / "lonely.ckpt"
    lonely.write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    assert main(["--checkpoint", str(lonely)]) == 2
    assert "--reference is missing, and no config.yaml" in capsys.readouterr().err
    assert main(["--checkpoint", checkpoint, "--lpips", "nowhere.pth"]) == 2
    assert "--lpips nowhere.pth: no such file" in capsys.readouterr().err
    assert main(["--checkpoint", checkpoint, "--sizes", "4x32x32"]) == 2
    assert "4x32x32" in capsys.readouterr().err
    videos = ["--videos", str(run), "--sizes", "5x32x32"]
    assert main(videos) == 2
    assert "--sizes only applies to the checkpoint of a tokenizer" in capsys.readouterr().err


def test_h264_does_not_pay_for_the_note_of_its_encoder(moving):
    packets = _encode(moving, 20.0, 8.0, "yuv420p")
    assert len(packets) == len(moving)
    assert b"x264" not in b"".join(packets)
