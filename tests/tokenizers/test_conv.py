from pathlib import Path

import pytest
import torch
import yaml

from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.tokenizers.tubelets import LinearTubelets
from sora_lightning.types import Compression

_EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def of_yaml(path: str) -> dict:
    """The arguments that an experiment gives its tokenizer."""
    model = yaml.safe_load((_EXPERIMENTS / path).read_text())["model"]
    return model["init_args"]["tokenizer"]["init_args"]


# W.A.L.T's strides (the defaults), 8 frames to one, and the strides that the experiments train.
CONFIGURATIONS = {
    "4x8x8": ({"widths": (8, 8, 16, 16)}, Compression(4, 8, 8)),
    "8x8x8": ({"widths": (8, 8, 16, 16), "down_time": (True, True, True)}, Compression(8, 8, 8)),
    "demo": (of_yaml("demo/tokenizer.yaml"), Compression(4, 8, 8)),
    "clips": (
        of_yaml("own_clips/tokenizer_gpu.yaml") | {"widths": [8, 16, 32]},
        Compression(4, 8, 8),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_in_every_configuration_no_frame_sees_the_future_and_an_image_is_one_frame(name):
    arguments, compression = CONFIGURATIONS[name]
    tokenizer = ConvTokenizer(**arguments).eval()
    for parameter in tokenizer.parameters():  # zero-initialised layers must count too
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    assert tokenizer.compression == compression
    step = compression.frames
    video = torch.rand(1, 3, 1 + 2 * step, 16, 8) * 2 - 1
    latents = tokenizer.encode(video)
    assert latents.shape[2:] == (3, 2, 1)
    torch.testing.assert_close(tokenizer.encode(video[:, :, :1]), latents[:, :, :1])
    changed = video.clone()
    changed[:, :, 1 + step :] *= -1
    again = tokenizer.encode(changed)
    torch.testing.assert_close(again[:, :, :2], latents[:, :, :2])
    assert (again[:, :, 2] - latents[:, :, 2]).abs().max() > 0.01
    pixels = tokenizer.decode_raw(latents)
    assert pixels.shape == video.shape
    image = tokenizer.decode_raw(latents[:, :, :1])
    torch.testing.assert_close(image, pixels[:, :, :1], atol=1e-4, rtol=1e-4)
    other = tokenizer.decode_raw(torch.cat([latents[:, :, :2], -latents[:, :, 2:]], dim=2))
    torch.testing.assert_close(
        other[:, :, : 1 + step], pixels[:, :, : 1 + step], atol=1e-4, rtol=1e-4
    )
    assert (other - pixels).abs().max() > 0.01


@pytest.fixture(
    params=[{}, {"separable": True}, {"linear_tubelets": True}],
    ids=["full", "separable", "tubelets"],
)
def tokenizer(request):
    tokenizer = ConvTokenizer(
        latent_channels=4,
        widths=(12, 24, 24),
        down_time=(True, True),
        down_space=(True, False),
        patch=2,
        blocks_per_level=1,
        **request.param,
    )
    for parameter in tokenizer.parameters():  # zero-initialised layers must count too
        torch.nn.init.normal_(parameter, std=0.2)
    return tokenizer.eval()


def test_geometry_is_what_the_arguments_say(tokenizer):
    assert tokenizer.compression == Compression(4, 4, 4)
    latents = tokenizer.encode(torch.randn(2, 3, 9, 16, 12))
    assert latents.shape == (2, 4, 3, 4, 3)
    assert tokenizer.decode(latents).shape == (2, 3, 9, 16, 12)
    assert ConvTokenizer().compression == Compression(4, 8, 8)  # W.A.L.T, FACTS 6


def test_no_latent_and_no_decoded_frame_sees_the_future(tokenizer):
    video = torch.rand(1, 3, 13, 8, 8) * 2 - 1
    latents = tokenizer.encode(video)
    for i in (1, 2):  # latent frame i covers frames 4 i - 3 .. 4 i
        changed = video.clone()
        changed[:, :, 4 * i + 1 :] *= -1
        again = tokenizer.encode(changed)
        torch.testing.assert_close(again[:, :, : i + 1], latents[:, :, : i + 1])
        assert not torch.allclose(again[:, :, i + 1 :], latents[:, :, i + 1 :])

        prefix = tokenizer.decode_raw(latents[:, :, : i + 1])
        whole = tokenizer.decode_raw(latents)[:, :, : 4 * i + 1]
        torch.testing.assert_close(prefix, whole, atol=1e-5, rtol=1e-5)


def test_an_image_is_encoded_as_the_first_frame_of_its_video(tokenizer):
    video = torch.rand(2, 3, 5, 8, 8) * 2 - 1
    torch.testing.assert_close(tokenizer.encode(video[:, :, :1]), tokenizer.encode(video)[:, :, :1])


@pytest.mark.parametrize("later", [4, 8, 12])
def test_a_video_in_pieces_has_the_latents_and_the_pixels_of_the_whole(tokenizer, later):
    video = torch.rand(2, 3, 25, 8, 12) * 2 - 1
    tokenizer.set_latent_statistics(torch.randn(4), torch.diag(torch.rand(4) + 0.5))
    whole = tokenizer.encode(video)
    pieces = torch.split(video[:, :, 1:], later, dim=2)
    latents = list(tokenizer.encode_pieces([video[:, :, :1], *pieces]))
    torch.testing.assert_close(torch.cat(latents, dim=2), whole, atol=1e-5, rtol=1e-5)
    decoded = torch.cat(list(tokenizer.decode_pieces(latents)), dim=2)
    torch.testing.assert_close(decoded, tokenizer.decode(whole), atol=1e-5, rtol=1e-5)


def test_pieces_of_other_lengths_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"must be 1 \+ a multiple of 4"):
        list(tokenizer.encode_pieces([torch.zeros(1, 3, 4, 8, 8)]))
    with pytest.raises(ValueError, match=r"must be 1 \+ a multiple of 4"):
        list(tokenizer.encode_pieces([torch.zeros(1, 3, 5, 8, 8), torch.zeros(1, 3, 5, 8, 8)]))


@pytest.mark.parametrize("whiten", [False, True])
def test_statistics_normalise_and_are_undone_in_decoding(tokenizer, whiten):
    video = torch.rand(8, 3, 5, 16, 16) * 2 - 1
    raw = tokenizer.posterior(video).mean.transpose(0, 1).flatten(1)  # c n
    before = tokenizer.decode(tokenizer.encode(video))
    tokenizer.set_latent_statistics(raw.mean(1), torch.cov(raw), whiten)
    latents = tokenizer.encode(video).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    expected = torch.eye(4) if whiten else torch.corrcoef(raw)
    torch.testing.assert_close(torch.cov(latents), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(video)), before, atol=1e-4, rtol=0)


def test_channels_and_axes_without_spread_are_refused(tokenizer):
    silent = torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"latent channels \[1\] have standard deviation 0"):
        tokenizer.set_latent_statistics(torch.zeros(4), silent)
    with pytest.raises(ValueError, match=r"principal axes \[0, 1, 2\] have standard deviation 0"):
        tokenizer.set_latent_statistics(torch.zeros(4), torch.ones(4, 4), whiten=True)


def test_fingerprint_follows_weights_and_statistics(tokenizer):
    first = tokenizer.fingerprint()
    assert tokenizer.fingerprint() == first
    tokenizer.latent_mean[0] += 1
    second = tokenizer.fingerprint()
    tokenizer.encoder[0].bias.data[0] += 1e-6
    assert len({first, second, tokenizer.fingerprint()}) == 3


def test_linear_tubelets_start_as_a_projection():
    """Before any training the video that comes back is the one that a linear map can keep."""
    tokenizer = ConvTokenizer(
        latent_channels=48,
        widths=(12, 24),
        down_time=(True,),
        down_space=(True,),
        patch=2,
        blocks_per_level=1,
        linear_tubelets=True,
    )
    assert tokenizer.compression == Compression(2, 4, 4)  # 96 values a box, half of them kept
    video = torch.randn(4, 3, 5, 16, 16)
    once = tokenizer.decode_raw(tokenizer.posterior(video).mean)
    torch.testing.assert_close(
        tokenizer.decode_raw(tokenizer.posterior(once).mean)[:, :, 1:],
        once[:, :, 1:],
        atol=1e-5,
        rtol=1e-5,
    )
    kept = once[:, :, 1:].square().sum() / video[:, :, 1:].square().sum()
    assert kept.item() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match=r"latent_channels = 97: .* holds only 96 values"):
        LinearTubelets(Compression(2, 4, 4), 97)


def test_sizes_and_levels_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match="9x16x10: width 10 is not a multiple of 4"):
        tokenizer.encode(torch.zeros(1, 3, 9, 16, 10))
    with pytest.raises(ValueError, match=r"widths has 3 levels, so .* need 2 entries"):
        ConvTokenizer(widths=(8, 8, 8), down_time=(True,), down_space=(True,))
    with pytest.raises(ValueError, match="both are false"):
        ConvTokenizer(widths=(8, 8), down_time=(False,), down_space=(False,))


def test_kl_is_the_closed_form_and_samples_have_its_moments():
    mean, log_variance = torch.tensor(0.7), torch.tensor(-1.2)
    posterior = DiagonalGaussian(
        mean.expand(1, 1, 1, 1, 50_000), log_variance.expand(1, 1, 1, 1, 50_000)
    )
    p = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    known = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl()[0] / 50_000, known)
    draws = posterior.sample(torch.randn(1, 1, 1, 1, 50_000))
    torch.testing.assert_close(draws.mean(), p.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(draws.std(), p.stddev, atol=0.01, rtol=0)
