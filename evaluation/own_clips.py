"""Protocol and small networks for the evaluation of a run on its own clips."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.inputs import read_listing
from evaluation.metrics.alignment import parse_prompt
from evaluation.protocol import Protocol, load_protocol
from evaluation.train_tiny import TinyTraining, train_tiny
from sora_lightning.files import load_yaml


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that saved a checkpoint."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def run_data(checkpoint: Path | None) -> dict[str, Any]:
    """Return ``data`` of a run's saved configuration, with its ``sizes`` and the ``root`` of its
    manifests; empty without one.
    """
    config = run_folder(checkpoint) / "config.yaml" if checkpoint is not None else Path()
    if not config.is_file():
        return {}
    data = dict(load_yaml(config.read_text(encoding="utf-8"))["data"])
    groups = [data.get(name) for name in ("batching", "reading")]
    for group in groups:
        data = (group if isinstance(group, dict) else {}) | data
    return data


def choose_protocol(
    name: str | None, reference: Path | None, data: dict[str, Any]
) -> tuple[Protocol, Path]:
    """Return a protocol and the path of the reference.

    Without a name the protocol is ``demo`` if all captions of the reference describe moving shapes,
    otherwise ``own`` with the length, frame rate and sizes of the run's ``data``.
    """
    if name is not None:
        protocol = load_protocol(name)
        reference = reference or protocol.paths.reference
        if reference is None:
            raise ValueError(f"protocol {protocol.name}: names no reference; give --reference")
        return protocol, reference
    demo = load_protocol("demo")
    validation = data.get("val_manifest")
    default = demo.paths.reference
    assert default is not None
    if isinstance(validation, str) and Path(validation).parent != default.parent:
        default = Path(validation)
    reference = reference or default
    entries = read_listing(reference, prompts=False, root=data.get("root"))
    try:
        for entry in entries:
            parse_prompt(entry.prompt)
    except ValueError:  # a caption that describes no moving shapes
        return _own(data), reference
    return demo, reference


def _own(data: dict[str, Any]) -> Protocol:
    protocol = load_protocol("own")
    listed = data.get("sizes")
    if not isinstance(listed, list):
        return protocol
    lengths = Counter(int(str(size).split("x")[0]) for size in listed)
    num_frames = max(lengths, key=lambda length: (lengths[length], length))
    sizes = dict.fromkeys(str(size).partition("x")[2] for size in listed)
    fps = float(data.get("fps") or protocol.clips.fps or 8)
    clips = replace(protocol.clips, num_frames=num_frames, fps=fps, sizes=tuple(sizes))
    return replace(protocol, clips=clips)


def small_networks(folder: Path, data: dict[str, Any], protocol: Protocol) -> Path:
    """Return the file of a run's small networks; train them on its clips if it is missing."""
    path = folder / "small_networks.pt"
    manifest = data.get("manifest")
    if not path.is_file():
        if not isinstance(manifest, str):
            raise ValueError(
                f"{path}: no such file, and no config.yaml there names a manifest to train it on; "
                "give --networks"
            )
        print(f"training the small networks of {path} on {manifest}", flush=True)
        train_tiny(Path(manifest), path, None, protocol.clips, TinyTraining(), data.get("root"))
    return path
