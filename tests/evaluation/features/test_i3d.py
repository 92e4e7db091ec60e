"""I3D has the public network's parts, names and paddings, and reads its weights in every form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.features.i3d import (
    I3D,
    InceptionI3D,
    TorchScriptI3D,
    Unit,
    pad_same,
    same_padding,
)
from evaluation.features.i3d_keys import SCHEMES, from_pytorch, scheme_of, to_pytorch
from evaluation.features.weights import digest_of

KEYS = json.loads(Path(__file__).with_name("i3d_keys.json").read_text())


@pytest.fixture(scope="module")
def network() -> InceptionI3D:
    torch.manual_seed(0)
    network = InceptionI3D().eval().requires_grad_(False)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
            part.bias.normal_(0, 0.1)
    return network


@pytest.fixture(scope="module")
def saved(network: InceptionI3D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    torch.save(network.state_dict(), path)
    return path


def test_names_and_shapes_are_those_of_the_public_file(network: InceptionI3D) -> None:
    """The file of names holds what the public PyTorch port's own state has."""
    state = network.state_dict()
    shapes = {k: list(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert shapes == KEYS
    assert len(state) == 344
    assert sum(p.numel() for p in network.parameters()) == 12_697_264


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_holds_the_same_weights_both_ways(network: InceptionI3D, scheme: str) -> None:
    state = {k: v for k, v in network.state_dict().items() if k in KEYS}
    theirs = from_pytorch(state, scheme)
    assert scheme_of(theirs) == scheme
    back = to_pytorch(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert len(theirs) == len(state) - (57 if scheme == "tensorflow" else 0)  # no gamma


def test_names_of_the_other_schemes() -> None:
    state = {name: torch.ones(shape) for name, shape in KEYS.items()}
    kinetics, tensorflow = from_pytorch(state, "kinetics"), from_pytorch(state, "tensorflow")
    assert kinetics["mixed_3b.branch_2.1.batch3d.running_var"].shape == (32,)
    root = "RGB/inception_i3d"
    assert tensorflow[f"{root}/Conv3d_1a_7x7/conv_3d/w"].shape == (7, 7, 7, 3, 64)
    # The graph's own slip: 3x3 kernels under the name 0a in one branch of one module.
    assert f"{root}/Mixed_5b/Branch_2/Conv3d_0a_3x3/conv_3d/w" in tensorflow
    assert f"{root}/Mixed_5c/Branch_2/Conv3d_0b_3x3/batch_norm/beta" in tensorflow
    with_gamma = state | {"Mixed_3b.b0.bn.weight": torch.full((64,), 2.0)}
    with pytest.raises(ValueError, match=r"Mixed_3b\.b0\.bn\.weight: is not 1"):
        from_pytorch(with_gamma, "tensorflow")


def test_wrapped_and_prefixed_files_load_and_give_the_same_features(
    network: InceptionI3D, saved: Path, tmp_path: Path
) -> None:
    state = {k: v for k, v in network.state_dict().items() if k in KEYS}
    prefixed = {f"module.{name}": value for name, value in from_pytorch(state, "kinetics").items()}
    torch.save({"state_dict": prefixed}, tmp_path / "wrapped.pt")
    plain, wrapped = I3D(str(saved)), I3D(str(tmp_path / "wrapped.pt"))
    assert plain.sha256 == wrapped.sha256 != I3D("random").sha256
    assert plain.label == "i3d-unverified"
    assert I3D("random").label == "i3d-random"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Mixed_9z.b0.conv3d.weight": torch.zeros(1)}, "Mixed_9z.b0.conv3d.weight is unexpected"),
        ({"logits.conv3d.bias": None}, "logits.conv3d.bias is missing"),
        ({"logits.conv3d.bias": torch.zeros(600)}, r"logits.conv3d.bias has shape \(600,\)"),
    ],
)
def test_a_file_of_another_network_is_refused_by_its_key(
    network: InceptionI3D, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state = {k: v for k, v in (dict(network.state_dict()) | change).items() if v is not None}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        I3D(str(tmp_path / "other.pt"))


def test_a_file_without_any_known_name_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"'conv1\.weight': is not a weight of I3D"):
        I3D(str(tmp_path / "resnet.pt"))


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_against_its_definition(kernel: int, stride: int) -> None:
    """As many outputs as strides begin within the input, the zeros shared out evenly."""
    for size in range(max(1, kernel - 2), 20):
        front, behind = same_padding(size, kernel, stride)
        outputs = math.ceil(size / stride)
        needed = max((outputs - 1) * stride + kernel - size, 0)
        assert front + behind == needed
        assert behind - front in (0, 1)


def test_a_padded_convolution_by_brute_force() -> None:
    x, w = torch.randn(1, 1, 5, 4, 7), torch.randn(1, 1, 3, 3, 3)
    got = F.conv3d(pad_same(x, (3, 3, 3), (2, 2, 2)), w, stride=2)[0, 0]
    fronts = [same_padding(n, 3, 2)[0] for n in (5, 4, 7)]
    assert got.shape == (3, 2, 4)
    for i, j, k in torch.cartesian_prod(*map(torch.arange, got.shape)).tolist():
        total = 0.0
        for a, b, c in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
            f, h, v = 2 * i + a - fronts[0], 2 * j + b - fronts[1], 2 * k + c - fronts[2]
            if 0 <= f < 5 and 0 <= h < 4 and 0 <= v < 7:
                total += float(x[0, 0, f, h, v] * w[0, 0, a, b, c])
        assert float(got[i, j, k]) == pytest.approx(total, abs=1e-5)


def test_the_epsilon_is_the_protocols() -> None:
    for eps in (1e-3, 1e-5):
        network = InceptionI3D(batch_norm_eps=eps)
        norms = [part.eps for part in network.modules() if isinstance(part, nn.BatchNorm3d)]
        assert norms == [eps] * 57
    settings = [I3D("random", batch_norm_eps=eps).record() for eps in (1e-3, 1e-5)]
    assert settings[0] != settings[1]
    x = torch.randn(2, 3, 2, 8, 8)
    unit, other = Unit(3, 4, 1, eps=1e-3).eval(), Unit(3, 4, 1, eps=1e-1).eval()
    other.load_state_dict(unit.state_dict())
    assert torch.allclose(unit(x) * (1 + 1e-3) ** 0.5, other(x) * 1.1**0.5, rtol=1e-5)


def test_nine_frames_are_enough_and_eight_are_not() -> None:
    i3d = I3D("random")
    with pytest.raises(ValueError, match="clips of 8 frames: i3d needs at least 9"):
        i3d(torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        i3d(torch.zeros(1, 3, 9, 32, 32))
    videos = torch.randint(0, 256, (1, 3, 9, 32, 40), dtype=torch.uint8)
    features = i3d(videos)
    assert features.shape == (1, 400)
    assert float(features.std()) > 0


class StandIn(nn.Module):
    """Takes what the public TorchScript file takes."""

    def forward(
        self,
        x: Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> Tensor:
        assert rescale
        assert resize
        assert return_features
        return x.mean(dim=(2, 3, 4)).repeat(1, 134)[:, :400]


def test_the_torchscript_file_runs_only_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "i3d.ts"
    torch.jit.script(StandIn()).save(str(path))
    scripted = TorchScriptI3D(str(path), digest_of(path))
    assert scripted.label == "i3d-torchscript-unverified"
    videos = torch.randint(0, 256, (2, 3, 9, 16, 16), dtype=torch.uint8)
    assert torch.allclose(scripted(videos)[:, :3], videos.float().mean(dim=(2, 3, 4)))
    with pytest.raises(ValueError, match=r"and git:93daef59.* is expected"):
        TorchScriptI3D(str(path))
    with pytest.raises(ValueError, match="is code and needs a digest"):
        TorchScriptI3D(str(path), "")
