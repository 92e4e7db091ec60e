"""Checks of a configuration before anything is built: files, the run's folder, clip sizes."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from sora_lightning.captioner.captioned_manifest import CaptionedManifest
from sora_lightning.checkpoints import init_args, read_checkpoint
from sora_lightning.checks import naming, require_at_least
from sora_lightning.cli.errors import nodes, refused_as
from sora_lightning.cli.geometry import check_size
from sora_lightning.cli.suggest import suggestion
from sora_lightning.conditioning import Conditioner
from sora_lightning.data import SizeFamily
from sora_lightning.data.batching.native_sizes import check_geometry
from sora_lightning.data.latents import LatentCache
from sora_lightning.denoisers import Denoiser
from sora_lightning.files import check_writable
from sora_lightning.layers.patch import Patch
from sora_lightning.systems import (
    CaptionerSystem,
    DiffusionSystem,
    PretrainedSystem,
    RecaptioningSystem,
)
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.trust import import_class
from sora_lightning.types import VideoSize

# Parameters of these names are read, never written, wherever in a configuration they stand.
_INPUTS = frozenset({"manifest", "val_manifest", "latents", "checkpoint", "start_from"})


class Problems(list[str]):
    """Sentences about what is wrong with a configuration, to be raised together."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a ``ValueError`` raised within, and go on."""
        try:
            yield
        except ValueError as error:
            self.append(str(error))

    def raise_all(self) -> None:
        """Raise a ``ValueError`` with a line for each problem, if there is any."""
        if self:
            raise ValueError("\n".join(self))


def check_run_directory(
    command: str, run_dir: Path | None, ckpt_path: str | None, model: Namespace
) -> str | None:
    """Return the checkpoint that ``command`` starts from; ``None`` to train from scratch.

    ``last`` is the newest checkpoint that can be read: ``last.ckpt`` unless that is damaged.

    Raises:
        ValueError: The run has no folder, or one that cannot be written to; the checkpoint is not
            there, damaged or one of another system; ``validate`` or ``predict`` has no trained
            weights; ``fit`` would mix a new training into the folder of another, or resume one
            with another configuration.
    """
    if run_dir is None:
        raise ValueError("run_dir is missing: the folder of this run, e.g. --run_dir runs/first")
    folder = Path(run_dir) / "checkpoints"
    last = folder / "last.ckpt"
    if command == "fit":
        with naming("run_dir:"):
            check_writable(folder)
    if ckpt_path is None and command == "fit":
        if last.exists():
            raise ValueError(
                f"run_dir = {str(run_dir)!r}: holds {last} of an earlier training. "
                "Go on from it with --ckpt_path last, or choose another --run_dir"
            )
        return None
    if ckpt_path is None and command == "predict" and not _trains(model):
        return None
    if ckpt_path is None:
        raise ValueError(
            f"{command} needs trained weights: give --ckpt_path FILE, or --ckpt_path last for "
            f"{last}"
        )
    if ckpt_path == "best":
        raise ValueError(
            f"ckpt_path = 'best': there is no file of this name, since a run keeps its last "
            f"checkpoints: give last, or a path in {folder}"
        )
    path = last if ckpt_path == "last" else Path(ckpt_path)
    older = [folder / "previous.ckpt", *sorted(folder.glob("step-*.ckpt"), reverse=True)]
    older = [one for one in older if one.is_file()] if ckpt_path == "last" else []
    if not path.is_file() and not older:
        raise ValueError(f"ckpt_path = {ckpt_path!r}: there is no file {path}{_instead(path)}")
    with naming(f"ckpt_path = {ckpt_path!r}:"):
        start, content = _readable(path, older)
        held = str(content["hyper_parameters"].get("_class_path", model.class_path))
        if held.rpartition(".")[2] != model.class_path.rpartition(".")[2]:
            raise ValueError(f"{start} holds a {held}, and model.class_path is {model.class_path}")
    if command == "fit":
        _check_unchanged(start, init_args(content), model.init_args.as_dict())
        if start != path and path.exists():
            os.replace(path, path.with_name("damaged.ckpt"))
    return str(start)


def _trains(model: Namespace) -> bool:
    """Return True if ``predict`` runs a part that the system trains."""
    system = import_class(model.class_path)
    if issubclass(system, DiffusionSystem):  # its tokenizer alone encodes
        return False
    return issubclass(system, CaptionerSystem) or not issubclass(system, RecaptioningSystem)


def lock(run_dir: Path) -> IO[str] | None:
    """Keep other trainings out of a run's folder for as long as the file that is returned is open.

    Raises ``ValueError`` where another process holds it. Only the first rank locks.
    """
    if getattr(rank_zero_only, "rank", 0):
        return None
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"run_dir = {str(run_dir)!r}: another training writes into it at this moment. "
            "Choose another --run_dir"
        ) from error
    except OSError:  # a file system without locks
        pass
    return file


def check_trainer(trainer: Namespace, system: type[LightningModule]) -> None:
    """Raise ``ValueError`` naming a key of the trainer that cannot be used here."""
    where = "trainer."
    require_at_least(1, where, accumulate_grad_batches=trainer.accumulate_grad_batches)
    require_at_least(0, where, gradient_clip_val=trainer.gradient_clip_val)
    if trainer.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches = {trainer.overfit_batches}: the data module plans the "
            "batches. To overfit, give data.manifest a file with a few clips"
        )
    for callback in trainer.callbacks or ():
        if str(getattr(callback, "class_path", "")).endswith(".LearningRateFinder"):
            raise ValueError(
                "trainer.callbacks has LearningRateFinder: the optimizer's factory holds the "
                "learning rate; compare several by `sora-lightning ablate`"
            )
    strategy = trainer.strategy
    name = str(getattr(strategy, "class_path", strategy)).rpartition(".")[2]
    if name.startswith("fsdp") or name in ("FSDPStrategy", "ModelParallelStrategy"):
        raise ValueError(
            f"trainer.strategy = {name}: give sora_lightning.systems.parallel.ShardedStrategy, "
            "which shards by FSDP2 and saves files that one device loads"
        )
    if name == "ShardedStrategy" and system.configure_model is LightningModule.configure_model:
        raise ValueError(
            f"trainer.strategy = ShardedStrategy: a {system.__name__} does not share its "
            "layers out; take ddp, and a smaller data.batching.pixels_per_batch with "
            "trainer.accumulate_grad_batches where memory is short: activations fill it"
        )


def _readable(path: Path, older: list[Path]) -> tuple[Path, dict[str, Any]]:
    """Return the first checkpoint that can be read, with its content.

    Raises the ``ValueError`` of ``path`` if none can be read.
    """
    try:
        return path, read_checkpoint(path, verify=True)
    except ValueError as error:
        for one in older:
            with suppress(ValueError):
                content = read_checkpoint(one, verify=True)
                rank_zero_info(f"{error}. Goes on from {one} (step {content['global_step']})")
                return one, content
        raise


def _check_unchanged(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ``ValueError`` naming the first key of a model that a resumed training changes."""
    for name, part in now.items():
        if name not in before:
            continue  # an argument newer than the checkpoint
        for key, was, given in _changes(before[name], part, name):
            raise ValueError(
                f"model.init_args.{key} = {given!r}: {path} was trained with {was!r}. Leave it as "
                "it was, or start a new run from these weights with --checkpoint.start_from"
            )


def _is_loaded(part: Any) -> bool:
    """Return True for a part that a function, such as ``load_tokenizer``, reads from a file."""
    class_path = part.get("class_path") if isinstance(part, dict) else None
    return class_path is not None and not isinstance(import_class(class_path), type)


def _changes(before: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key that both have with different values, and the two values."""
    if _is_loaded(now):
        return  # the checkpoint holds what a function loaded
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() & now.keys()):
            yield from _changes(before[key], now[key], f"{path}.{key}")
    elif isinstance(before, list | tuple) and isinstance(now, list | tuple):
        if len(before) == len(now) and all(isinstance(one, dict) or callable(one) for one in now):
            for index, (one, other) in enumerate(zip(before, now, strict=True)):
                yield from _changes(one, other, f"{path}[{index}]")
        elif list(map(str, before)) != list(map(str, now)):
            yield path, list(before), list(now)
    elif callable(now):  # a default that no YAML gives: the checkpoint holds its import path
        if import_class(str(before)) is not now:
            yield path, before, f"{now.__module__}.{now.__qualname__}"
    elif str(before) != str(now):
        yield path, before, now


def check_inputs(config: Namespace) -> None:
    """Raise ``ValueError`` naming key and path of each file that a configuration reads and that is
    not there, and the YAMLs whose heads say how such files are made."""
    missing = [
        f"{key} = {str(value)!r}: there is no such file or folder{_instead(Path(value))}"
        for key, value in nodes(config.as_dict())
        if key.rpartition(".")[2] in _INPUTS
        and isinstance(value, str | Path)
        and not Path(value).exists()
    ]
    if missing:
        given = [str(path) for path in config.get("config") or []]
        heads = ", ".join(path for path in given if "\n# Command" in Path(path).read_text()[:1000])
        first = f"\nWhat to run first stands at the head of {heads}" if heads else ""
        raise ValueError("\n".join(missing) + first)


def check_latents(command: str, config: Namespace) -> None:
    """Raise ``ValueError`` where ``predict`` has no folder to write latents to, or no manifest to
    write captions to, or a training's ``data.latents`` is no cache of them.
    """
    captions = issubclass(import_class(config.model.class_path), RecaptioningSystem)
    if command == "predict" and captions:
        if config.captions.output is None:
            raise ValueError(
                "captions.output is missing: the copy of data.manifest that predict writes, with "
                "captions"
            )
        CaptionedManifest(config.data.manifest, config.captions.output, config.captions.column)
        return
    if command == "predict" and config.latents.root is None:
        raise ValueError("latents.root is missing: the folder that predict writes latents to")
    if command == "predict":
        with naming("latents.root:"):
            check_writable(Path(config.latents.root))
    if command != "predict" and config.data.latents is not None:
        with naming("data.latents:"):
            LatentCache.open(config.data.latents)


def check_sizes(config: Namespace) -> None:
    """Raise ``ValueError`` naming each size of ``data.batching`` that the tokenizer and the
    denoiser cannot cut evenly.

    Their geometry is read from the objects themselves, built on the meta device, where weights take
    no memory. What they refuse at construction is refused here already, with its key.
    """
    parts = config.model.init_args.as_dict() if config.model else {}
    with torch.device("meta"), warnings.catch_warnings():
        # Of a checkpoint's weights, which are not needed, and of parts that a system is given.
        warnings.filterwarnings("ignore", ".*(meta parameter|saved during checkpointing).*")
        if parts.get("pipeline"):
            with refused_as("model.init_args", {"model": config.model.as_dict()}):
                system = _instantiated(PretrainedSystem, config.model.as_dict())
            tokenizer, patch = system.tokenizer, system.denoiser.patch
        elif parts.get("tokenizer"):
            tokenizer, patch = _tokenizer_and_patch(parts)
        else:
            return
    if config.data.packing is not None:
        packing = config.data.packing
        with naming("data.packing:"):
            check_geometry(packing.compression, packing.patch, tokenizer.compression, patch)
    problems = Problems()
    for key in ("data.batching.sizes", "data.batching.predict_sizes"):
        texts = config.get(key) or []
        if isinstance(texts, Namespace):
            with naming(f"{key}:"):
                texts = list(map(str, SizeFamily(**texts.as_dict()).sizes()))
        for index, text in enumerate(texts):
            with problems.noted():
                with naming(f"{key}[{index}]:"):
                    size = VideoSize.parse(text)
                check_size(f"{key}[{index}]", size, tokenizer.compression, patch)
    problems.raise_all()


def _tokenizer_and_patch(parts: dict[str, Any]) -> tuple[VideoTokenizer, Patch | None]:
    """Return a system's tokenizer, and the patch of its denoiser if it has one."""
    tokenizer = _build(VideoTokenizer, "tokenizer", parts)
    if not parts.get("denoiser"):
        return tokenizer, None
    condition_width = _build(Conditioner, "conditioner", parts).width
    factory = Callable[[int, int], Denoiser]
    denoiser = _build(factory, "denoiser", parts, tokenizer.latent_channels, condition_width)
    return tokenizer, denoiser.patch


def _build(hint: Any, name: str, parts: dict[str, Any], *first: int) -> Any:
    """Build the part of that name; call it with ``first`` where it is a factory, or check that a
    denoiser was built for them.
    """
    with refused_as(f"model.init_args.{name}", {"model": {"init_args": {name: parts[name]}}}):
        part = _instantiated(hint, parts[name])
        if isinstance(part, Denoiser):
            part.factory(*first)
            return part
        return part(*first) if first else part


def _instantiated(hint: Any, part: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=hint)
    return parser.instantiate(parser.parse_object({"part": part})).part


def _instead(path: Path) -> str:
    """Suggest a file beside the missing one with a similar name."""
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    near = suggestion(path.name, [p.name for p in path.parent.iterdir()])
    return f". {near}" if near.startswith("Did") else ""
