"""Protocols: read strictly, and fingerprinted by all that moves a score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.protocol import SHIPPED, Protocol, fingerprint, load_protocol


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


def test_shipped_protocols_load() -> None:
    names = [path.stem for path in SHIPPED.glob("*.yaml")]
    assert "demo" in names
    assert [load_protocol(name).name for name in names] == names


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("clips", "num_frame"), 17, r"clips.num_frame is no key.*did you mean clips.num_frames"),
        (("clips", "fps"), None, "clips.fps is missing"),
        (("clips", "fps"), "fast", "clips.fps = 'fast': must be of type float"),
        (("clips", "num_frames"), True, "clips.num_frames = True: must be of type int"),
        (("clips", "num_frames"), 2, "clips.num_frames = 2: must be at least 4"),
        (("clips", "sizes"), ["32x32", "32"], r"clips.sizes\[1\] = '32': must be height x width"),
        (("clips", "sizes"), "32x32", "clips.sizes = '32x32': must be a list"),
        (("sampling",), 3, "sampling.* is 3: must be a mapping"),
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
    elsewhere = replace(protocol, paths=replace(protocol.paths, output=Path("elsewhere")))
    assert fingerprint(elsewhere.settings()) == own
    for other in (
        replace(protocol, clips=replace(protocol.clips, fps=9.0)),
        replace(protocol, sampling=replace(protocol.sampling, guidance_scale=3.0)),
        replace(protocol, scores=replace(protocol.scores, seed=1)),
    ):
        assert fingerprint(other.settings()) != own
