"""Protocols: read strictly, and fingerprinted by all that moves a score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from evaluation.features import TinyFile
from evaluation.features.cache import FeatureCache
from evaluation.fingerprint import fingerprint
from evaluation.networks import score_name
from evaluation.protocol import SHIPPED, Protocol, load_protocol


def changed(tmp_path: Path, *path: str, value: Any) -> str:
    """The demo's protocol with one key set, at a path of its own."""
    content = yaml.safe_load((SHIPPED / "demo.yaml").read_text())
    group = content
    for key in path[:-1]:
        group = group[key]
    if value is None:
        del group[path[-1]]
    else:
        group[path[-1]] = value
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def _yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())


def test_shipped_protocols_load() -> None:
    names = [path.stem for path in SHIPPED.glob("*.yaml")]
    assert "demo" in names
    assert [load_protocol(name).name for name in names] == names


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("clips", "num_frame"),
            17,
            r"clips.num_frame: no such key in ClipSpec. Did you mean num_frames\?",
        ),
        (("clips", "fps"), None, "clips.fps is missing"),
        (("clips", "fps"), "fast", "clips.fps = 'fast': expected a number or null"),
        (("clips", "num_frames"), True, "clips.num_frames = True: expected a whole number"),
        (("clips", "num_frames"), 2, "clips.num_frames = 2: must be at least 4"),
        (("clips", "sizes"), ["32x32", "32"], r"clips.sizes\[1\] = '32': must be height x width"),
        (("clips", "sizes"), "32x32", r"clips.sizes = '32x32': expected tuple\[str, ...\]"),
        (("sampling",), 3, "sampling = 3: expected the parameters of SamplingSpec"),
        (("sampling", "num_steps"), 0, "sampling.num_steps = 0: must be at least 1"),
        (("scores", "least_videos"), 2, "scores.least_videos = 2: must be at least 8"),
    ],
)
def test_a_wrong_key_is_named_with_its_path(
    tmp_path: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_protocol(changed(tmp_path, *path, value=value))
    assert "changed.yaml" in str(refused.value)


def test_an_unknown_protocol_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'dmo': no such file; shipped are .*demo"):
        load_protocol("dmo")


def test_the_fingerprint_moves_with_scores_and_not_with_places(protocol: Protocol) -> None:
    own = fingerprint(protocol.settings())
    assert own == fingerprint(load_protocol("demo").settings())
    elsewhere = replace(protocol, paths=replace(protocol.paths, networks=Path("elsewhere")))
    assert fingerprint(elsewhere.settings()) == own
    for other in (
        replace(protocol, clips=replace(protocol.clips, fps=9.0)),
        replace(protocol, sampling=replace(protocol.sampling, guidance_scale=3.0)),
        replace(protocol, scores=replace(protocol.scores, seed=1)),
    ):
        assert fingerprint(other.settings()) != own


def test_shipped_protocols_differ_in_what_they_say_of_the_same_videos() -> None:
    """Each has its own windows, sizes, covariance or network; so each has a fingerprint."""
    names = [path.stem for path in SHIPPED.glob("*.yaml")]
    assert {"fvd2048_16f", "tfgan", "videogpt", "content_debiased"} <= set(names)
    prints = {
        fingerprint({**load_protocol(n).settings(), "networks": _yaml(n).get("networks")})
        for n in names
    }
    assert len(prints) == len(names)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("clips", "reference_window"), "end", "clips.reference_window = 'end': must be one of"),
        (("scores", "num_generated"), 3, "scores.num_generated = 3: must be at least"),
        (("scores", "covariance_ddof"), 2, "scores.covariance_ddof = 2: must be 0 or 1"),
        (
            ("networks",),
            {"videos": {"init_args": {}}},
            "networks.videos = .*: .*given by class_path",
        ),
        (("networks",), 3, "networks = 3: expected the parameters of Networks"),
        (("networks",), {"frames_per_video": 0}, "networks.frames_per_video = 0: must be"),
    ],
)
def test_optional_keys_are_checked_too(
    tmp_path: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_protocol(changed(tmp_path, *path, value=value))


def test_networks_are_built_with_their_types_checked(tmp_path: Path) -> None:
    def load(class_path: str, **init_args: str) -> Protocol:
        part = {"class_path": class_path, "init_args": init_args}
        return load_protocol(changed(tmp_path, "networks", value={"videos": part}))

    videos = load("evaluation.features.TinyFile", weights="random").networks.videos
    assert videos is not None
    assert score_name("fvd", videos()) == "fvd-tiny-random"
    for class_path, argument, message in (
        ("evaluation.features.TinyFil", "weights", "networks.videos.* = .*TinyFil"),
        ("evaluation.features.TinyFile", "weigths", "networks.videos.*weigths.*weights"),
        ("torch.nn.ReLU", "inplace", "networks.videos.*torch.nn.ReLU"),
        ("os.system", "command", "os.system is not built: a file may name classes of"),
    ):
        with pytest.raises(ValueError, match=message):
            load(class_path, **{argument: "true"})


def test_only_the_published_networks_give_the_plain_names() -> None:
    class Named(TinyFile):
        def __init__(self, kind: str, standing: str) -> None:
            super().__init__("random")
            self.kind, self.standing = kind, standing

    assert score_name("fvd", Named("i3d", "")) == "fvd"
    assert score_name("fid", Named("inception", "")) == "fid"
    assert score_name("fvd", Named("i3d", "random")) == "fvd-i3d-random"
    assert score_name("fvd", Named("i3d", "unverified")) == "fvd-i3d-unverified"
    assert score_name("fvd", Named("videomae", "")) == "fvd-videomae"
    assert score_name("fid", Named("i3d", "")) == "fid-i3d"


def test_cached_features_are_those_of_the_data_and_the_settings(tmp_path: Path) -> None:
    draws = iter(torch.arange(60.0).reshape(5, 4, 3))
    settings = {"fps": 8.0}

    def features(dataset: str, settings: dict[str, Any]) -> Tensor:
        cache = FeatureCache(tmp_path, "tiny", dataset, settings)
        if (kept := cache.read()) is None:
            cache.write(next(draws))
        return cache.read() if kept is None else kept

    first = features("a" * 64, settings)
    assert torch.equal(features("a" * 64, settings), first)
    assert not torch.equal(features("b" * 64, settings), first)
    assert not torch.equal(features("a" * 64, {"fps": 9.0}), first)
    of_first = fingerprint(settings)[:16]
    mine, other = (tmp_path / f"tiny-{16 * letter}-{of_first}.pt" for letter in "ab")
    content = torch.load(mine, weights_only=True)
    torch.save(content, other)
    with pytest.raises(ValueError, match=r"holds features of dataset a+, and b+ is asked for"):
        features("b" * 64, settings)
    torch.save({**content, "protocol": "0" * 64}, mine)
    with pytest.raises(ValueError, match=r"holds features of protocol 0+, and .* is asked for"):
        features("a" * 64, settings)
    torch.save({**content, "features": content["features"] + 1}, mine)
    with pytest.raises(ValueError, match=f"and {content['checksum']} was saved"):
        features("a" * 64, settings)
