"""What is checked between reading a configuration and building anything: files, the run's folder,
clip sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from sora_lightning.cli.geometry import check_size
from sora_lightning.cli.suggest import suggestion
from sora_lightning.conditioning import Conditioner
from sora_lightning.data import SizeFamily
from sora_lightning.data.batching.native_sizes import check_geometry
from sora_lightning.data.latents import LatentCache
from sora_lightning.denoisers import Denoiser
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.types import VideoSize

# Parameters of these names are read, never written, wherever in a configuration they stand.
_INPUTS = frozenset({"manifest", "val_manifest", "latents", "checkpoint", "start_from"})


def check_run_directory(verb: str, run_dir: Path | None, ckpt_path: str | None) -> str | None:
    """The checkpoint that ``verb`` starts from, as a path that exists; ``None`` for a training from
    scratch.

    Raises:
        ValueError: The run has no folder; the checkpoint is not there; ``validate`` or ``predict``
            is to judge weights that nothing trained; or ``fit`` would mix a new training into the
            folder of another.
    """
    if run_dir is None:
        raise ValueError("run_dir is missing: the folder of this run, e.g. --run_dir runs/first")
    last = Path(run_dir) / "checkpoints" / "last.ckpt"
    if ckpt_path is None and verb == "fit":
        if last.exists():
            raise ValueError(
                f"run_dir = {str(run_dir)!r}: holds {last} of an earlier training. "
                "Go on from it with --ckpt_path last, or choose another --run_dir"
            )
        return None
    if ckpt_path is None:
        raise ValueError(
            f"{verb} needs trained weights: give --ckpt_path FILE, or --ckpt_path last for {last}"
        )
    path = last if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        raise ValueError(f"ckpt_path = {ckpt_path!r}: there is no file {path}{_instead(path)}")
    return str(path)


def check_inputs(config: Namespace) -> None:
    """Raise ``ValueError`` naming key and path of the first file that a configuration reads and
    that is not there."""
    for key, value in _leaves(config.as_dict()):
        if (
            key.rpartition(".")[2] in _INPUTS
            and isinstance(value, str | Path)
            and not Path(value).exists()
        ):
            raise ValueError(
                f"{key} = {str(value)!r}: there is no such file or folder{_instead(Path(value))}"
            )


def check_latents(verb: str, config: Namespace) -> None:
    """Raise ``ValueError`` where ``predict`` has no folder to write latents to, or a training's
    ``data.latents`` is no cache of them.
    """
    if verb == "predict" and config.latents.root is None:
        raise ValueError("latents.root is missing: the folder that predict writes latents to")
    if verb != "predict" and config.data.latents is not None:
        with _named("data.latents"):
            LatentCache.open(config.data.latents)


def check_sizes(config: Namespace) -> None:
    """Raise ``ValueError`` naming the first of ``data.sizes`` that the tokenizer and the denoiser
    cannot cut evenly.

    Their geometry is read from the objects themselves, built on the meta device, where weights take
    no memory. What they refuse at construction is refused here already, with its key.
    """
    parts = config.model.init_args.as_dict() if config.model else {}
    if not parts.get("tokenizer"):
        return
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*meta parameter.*"
        )  # a checkpoint's weights, not needed
        tokenizer = _build(VideoTokenizer, "tokenizer", parts)
        patch = None
        if parts.get("denoiser"):
            condition_width = _build(Conditioner, "conditioner", parts).width
            factory = Callable[[int, int], Denoiser]
            patch = _build(
                factory, "denoiser", parts, tokenizer.latent_channels, condition_width
            ).patch
    if config.data.packing is not None:
        packing = config.data.packing
        with _named("data.packing"):
            check_geometry(packing.compression, packing.patch, tokenizer.compression, patch)
    texts = config.data.sizes or []
    if isinstance(texts, Namespace):
        with _named("data.sizes"):
            texts = list(map(str, SizeFamily(**texts.as_dict()).sizes()))
    for index, text in enumerate(texts):
        key = f"data.sizes[{index}]"
        with _named(key):
            size = VideoSize.parse(text)
        check_size(key, size, tokenizer.compression, patch)


def _build(hint: Any, name: str, parts: dict[str, Any], *first: int) -> Any:
    """The part of that name; for a factory, what it gives when called with ``first``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=hint)
    with _named(f"model.init_args.{name}"):
        part = parser.instantiate(parser.parse_object({"part": parts[name]})).part
        return part(*first) if first else part


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, node


def _instead(path: Path) -> str:
    """What stands beside the missing file under a similar name."""
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    near = suggestion(path.name, [p.name for p in path.parent.iterdir()])
    return f". {near}" if near.startswith("Did") else ""
