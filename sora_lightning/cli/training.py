"""The commands fit, validate and predict, which a Trainer runs. One YAML names the system, the
data and the run's folder.

Source of the machinery: `lightning.pytorch.cli.LightningCLI`; this file changes the defaults that
would lose work or ignore a setting, and turns refusals into one sentence.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf.errors import OmegaConfBaseException

from sora_lightning.callbacks.checkpoint import NonFiniteError, RunCheckpoint, SaveError
from sora_lightning.callbacks.nonfinite import SkipNonFinite
from sora_lightning.callbacks.progress import ParameterSummary, Progress
from sora_lightning.callbacks.throughput import Throughput
from sora_lightning.callbacks.watchdog import Watchdog
from sora_lightning.callbacks.writers import CaptionWriter, LatentWriter
from sora_lightning.cli.errors import (
    REFUSED,
    Terminated,
    at_its_key,
    exit_code,
    filter_warnings,
    refused_as,
)
from sora_lightning.cli.explain import explain_refusal
from sora_lightning.cli.preflight import (
    Problems,
    check_inputs,
    check_latents,
    check_run_directory,
    check_sizes,
    check_trainer,
    lock,
)
from sora_lightning.cli.record import RunRecord
from sora_lightning.cli.sources import merge, read_sources, with_found_configs
from sora_lightning.data import VideoDataModule
from sora_lightning.trust import (
    check_evaluation,
    class_paths,
    import_class,
    trust_only_known_packages,
)

COMMANDS = ("fit", "validate", "predict")
PARSER = {"parser_mode": "omegaconf+", "exit_on_error": False, "allow_abbrev": False}
_GROUPS: dict[str, Any] = {
    "model": LightningModule,
    "data": VideoDataModule,
    "trainer": Trainer,
    "checkpoint": RunCheckpoint,
    "nonfinite": SkipNonFinite,
    "watchdog": Watchdog,
    "latents": LatentWriter,
    "captions": CaptionWriter,
    "run_dir": Path,
    "ckpt_path": str,
    "seed_everything": bool | int,
    "weights_only": bool,
    "return_predictions": bool,
    "verbose": bool,
}
_LINKED = frozenset({"checkpoint.dirpath", "model.init_args.fps"})


class TrainingCLI(LightningCLI):
    """LightningCLI whose runs live in one folder each, and which checks a configuration before it
    builds anything.

    Keys beside Lightning's own: ``run_dir`` (TensorBoard events, ``config.yaml`` and
    ``checkpoints/last.ckpt`` go there) and ``checkpoint`` (how often). A system that takes ``fps``
    gets the data's. Of the commands, only the given one gets a parser: to build one takes as long
    as to parse with it.
    """

    def __init__(self, command: str, **settings: Any) -> None:
        self._command = command
        super().__init__(LightningModule, VideoDataModule, **settings)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=Path, help="the folder of this run, one for each run")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SkipNonFinite, "nonfinite")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(LatentWriter, "latents")
        parser.add_lightning_class_args(CaptionWriter, "captions")
        parser.link_arguments("run_dir", "trainer.default_root_dir", compute_fn=str)
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=_checkpoints_of)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given: Lightning would let the checkpoint's hyperparameters
        override it."""

    def _dump_config(self) -> None:
        """Keep the configuration for the hyperparameters, as Lightning does, without parsing it
        once more."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(
                self.config, skip_unset=False, skip_link_targets=False, skip_validation=True
            )
            self.config_dump = yaml.safe_load(text)[self.subcommand]

    def before_instantiate_classes(self) -> None:
        command = str(self.subcommand)
        config = self.config[command]
        if config.weights_only is False:
            raise ValueError("weights_only = False: a checkpoint that needs it may run any program")
        # Not a link: with one, jsonargparse 4.53 takes no key of the model on the command line as
        # soon as a function, such as load_tokenizer, is the class_path of a part.
        if "fps" in config.model.init_args:
            config.model.init_args.fps = config.data.fps
        problems = Problems()
        with problems.noted():
            check_trainer(config.trainer, import_class(config.model.class_path))
        with problems.noted():
            config.ckpt_path = check_run_directory(
                command, config.run_dir, config.ckpt_path, config.model
            )
        with problems.noted():
            check_inputs(config)
            check_latents(command, config)
            check_sizes(config)
        problems.raise_all()
        _leave_cores_to(config.data.reading.num_workers)

    def _set_seed(self) -> None:
        with refused_as("seed_everything"):
            super()._set_seed()

    def instantiate_classes(self) -> None:
        with refused_as("the configuration", self.config[self.subcommand].as_dict()):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config: Namespace = self.config_init[self.subcommand]
        if self.subcommand == "predict":
            config.trainer.logger = False
        elif config.trainer.logger in (None, True):
            config.trainer.logger = TensorBoardLogger(
                config.run_dir, name="", version="", default_hp_metric=False
            )
        if self.subcommand != "fit":
            self.save_config_callback = None  # config.yaml stays the one that the weights come from
        # Throughput counts in training alone, and owns its state in checkpoints elsewhere, too.
        added: list[Callback] = [Throughput()]
        if config.trainer.enable_progress_bar is not False:
            added.append(Progress())
        if config.trainer.enable_model_summary is not False:
            added.append(ParameterSummary())
            config.trainer.enable_model_summary = False  # Lightning's own
        config.trainer.callbacks = [*(config.trainer.callbacks or []), *added]
        try:
            return super().instantiate_trainer(**kwargs)
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            raise ValueError(
                f"trainer.callbacks: {str(error).partition('.')[0]}; every run has Throughput, and "
                "the callbacks of the keys checkpoint, nonfinite and watchdog"
            ) from error

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "fit":
            self._lock = lock(Path(self.config[subcommand].run_dir))
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits with code 1
                raise KeyboardInterrupt from error
            if self.trainer.received_sigterm and not isinstance(error, SaveError | NonFiniteError):
                raise Terminated(signal.SIGTERM, self._how_to_resume()) from error
            if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
                path, first = self.config[subcommand].ckpt_path, str(error).splitlines()[1].strip()
                raise ValueError(
                    f"ckpt_path = {path!r}: its weights do not fit: {first}"
                ) from error
            if type(error) is ValueError and exit_code(error) == REFUSED:
                values = self.config[subcommand].as_dict()
                raise ValueError(at_its_key(str(error), values) or str(error)) from error
            raise

    def _how_to_resume(self) -> str:
        config = self.config[self.subcommand]
        if self.subcommand != "fit" or not (Path(config.checkpoint.dirpath) / "last.ckpt").exists():
            return ""
        step = self.trainer.global_step
        return f" after step {step}: the same command with --ckpt_path last resumes from it"


def run_training(argv: list[str], cli: type[TrainingCLI] = TrainingCLI) -> TrainingCLI:
    """Run ``fit``, ``validate`` or ``predict``: ``argv`` starts with the command.

    Raises:
        ValueError: The configuration is refused; the message names the key, its value and what
            would be right.
    """
    # Interpolations written from the root, ${data.fps}, then also hold below the command.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    trust_only_known_packages()
    filter_warnings()
    argv = with_found_configs(argv)
    _check_whole(argv)
    num_threads = torch.get_num_threads()
    try:
        return cli(
            argv[0],
            subclass_mode_model=True,
            trainer_defaults={
                "use_distributed_sampler": False
            },  # the data module serves each rank its own clips
            seed_everything_default=0,
            save_config_callback=RunRecord,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            parser_kwargs={**PARSER, argv[0]: dict(PARSER)},
            args=argv,
        )
    except ArgumentError as error:
        explanation = explain_refusal(str(error), argv[1:], _GROUPS, linked=_LINKED)
        raise ValueError(explanation) from error
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    finally:
        torch.set_num_threads(num_threads)


def _leave_cores_to(num_workers: int) -> None:
    """Reduce torch's threads by the number of workers, so that each worker has a core.

    Sums over another number of threads differ in their last bits. For the same weights with any
    number of workers set OMP_NUM_THREADS, as torchrun does; it is then left unchanged.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - num_workers))


def _check_whole(argv: list[str]) -> None:
    """Raise ``ValueError`` for a command without an experiment, and for a system's fps that differs
    from its data's."""
    config: dict[str, Any] = {}
    for source in read_sources(argv[1:]):
        config = merge(config, source.values)
    if {"help", "h", "print_config", "print_shtab"}.intersection(config) or "-h" in argv:
        return
    model, data = config.get("model"), config.get("data")
    if model is None:
        raise ValueError(
            f"model is missing: {argv[0]} needs an experiment, e.g. "
            "--config experiments/demo/tokenizer.yaml"
        )
    if isinstance(model, dict) and "class_path" not in model:
        raise ValueError(
            "model has no class_path: a YAML that varies another is given after it, "
            "--config BASE --config DELTA"
        )
    if any(path.startswith("evaluation.") for path in class_paths(config)):
        check_evaluation()
    given = model.get("init_args") if isinstance(model, dict) else None
    if not (isinstance(given, dict) and isinstance(data, dict) and "fps" in given):
        return
    if str(float(given["fps"])) != str(float(data.get("fps", "nan"))):
        raise ValueError(
            f"model.init_args.fps = {given['fps']}: is taken from data.fps = {data.get('fps')}; "
            "leave it out"
        )


def _checkpoints_of(run_dir: Path | None) -> Path | None:
    return None if run_dir is None else Path(run_dir) / "checkpoints"
