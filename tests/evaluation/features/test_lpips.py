"""LPIPS is torchmetrics' LPIPS with the same weights, under an honest name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchmetrics.functional.image.lpips as theirs
from einops import rearrange, reduce
from torch import Tensor

from evaluation.features import Lpips
from evaluation.features.weights import digest_of
from evaluation.metrics import Reconstruction


def pairs(n: int, side: int = 40) -> tuple[Tensor, Tensor]:
    real = torch.randint(0, 256, (n, 3, 2, side, side), dtype=torch.uint8)
    noise = torch.randint(-30, 31, real.shape)
    return real, (real.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_equals_torchmetrics_with_the_same_weights(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network for classes is built by torchvision, which need not be installed: ours has the
    same layers under the same numbers.
    """
    ours = Lpips("random", backbone=backbone)  # type: ignore[arg-type]
    monkeypatch.setattr(
        theirs, "_get_tv_model_features", lambda net, pretrained: ours.network.features
    )
    reference = theirs._LPIPS(net=backbone, pnet_rand=True)
    real, other = pairs(2)
    frames, others = (rearrange(v, "b c F H W -> (b F) c H W") / 127.5 - 1 for v in (real, other))
    with torch.no_grad():
        expected = reduce(reference(frames, others), "(b F) 1 1 1 -> b", "mean", F=2)
    assert torch.allclose(ours(real, other), expected, rtol=1e-4)
    assert float(expected.min()) > 0


def test_equal_videos_have_no_distance_and_more_noise_has_more() -> None:
    lpips = Lpips("random")
    real, other = pairs(2)
    worse = (real.int() + 3 * (other.int() - real.int())).clamp(0, 255).to(torch.uint8)
    assert lpips(real, real).tolist() == [0, 0]
    assert bool((lpips(real, worse) > lpips(real, other)).all())
    assert torch.allclose(lpips(real, other), lpips(other, real))


def test_weights_come_from_torchvisions_file_and_name_the_score(tmp_path: Path) -> None:
    network = Lpips("random")
    state = {
        f"features.{name}": value for name, value in network.network.features.state_dict().items()
    }
    torch.save(state | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "alexnet.pth")
    path = str(tmp_path / "alexnet.pth")
    loaded = Lpips(path, digest_of(Path(path)))
    assert loaded.sha256 == network.sha256
    assert (network.label, loaded.label) == ("alex-random", "alex-unverified")
    assert Lpips(path).record()["name"] == "lpips-alex-unverified"
    with pytest.raises(ValueError, match=r"is sha256:.*, and sha256:7be5be79.* is expected"):
        Lpips(path, "sha256:7be5be79" + 56 * "0")
    with pytest.raises(ValueError, match=r"features\.0\.weight|0\.weight has shape|missing"):
        Lpips(path, backbone="vgg")
    with pytest.raises(ValueError, match="drawn weights have none"):
        Lpips("random", "sha256:" + 64 * "0")


def test_what_cannot_be_compared_is_refused() -> None:
    lpips = Lpips("random")
    real, _ = pairs(1)
    with pytest.raises(ValueError, match="must be uint8 of one shape"):
        lpips(real, real.float())
    with pytest.raises(ValueError, match="clips of 30x30 pixels: lpips-alex needs 31"):
        lpips(real[..., :30, :30], real[..., :30, :30])
    assert lpips(real[..., :31, :31], real[..., :31, :31]).tolist() == [0]


def test_the_metric_gives_it_beside_psnr_and_ssim() -> None:
    lpips = Lpips("random")
    real, other = pairs(3)
    metric = Reconstruction(lpips)
    metric.update(real[:2], other[:2], ids=[0, 1])
    metric.update(real[1:], other[1:], ids=[1, 2])
    scores = metric.compute()
    assert set(scores) == {"psnr", "ssim", "lpips-alex-random"}
    expected = float(lpips(real, other).double().mean())
    assert float(scores["lpips-alex-random"]) == pytest.approx(expected, rel=1e-5)
