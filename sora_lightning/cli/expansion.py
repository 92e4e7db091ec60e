"""The command ``train-expansion``, and how ``sample`` expands prompts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, RandomSampler

from sora_lightning.captioner.expansion import (
    TEMPLATE,
    ExpansionModel,
    LanguageModelExpansion,
    PromptExpansion,
)
from sora_lightning.checks import naming, require_at_least, require_seed
from sora_lightning.cli.errors import filter_warnings
from sora_lightning.data.manifest.records import read_texts
from sora_lightning.files import check_output

# Beside a checkpoint of a text-to-video training, this file expands its prompts.
BESIDE = "expansion.ckpt"


@dataclass(frozen=True)
class Expansion:
    """Whether and how prompts are expanded into descriptions before they are sampled from.

    Args:
        expand: A checkpoint of train-expansion, or the folder of a causal language model of
            transformers. By default expansion.ckpt beside the checkpoint, where there is one.
        no_expand: Sample from the prompts as they are.
        template: What a model of transformers is asked; {prompt} stands for the prompt.
        max_new_tokens: Most tokens of its answer.
    """

    expand: Path | None = None
    no_expand: bool = False
    template: str = TEMPLATE
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.expand is not None and self.no_expand:
            raise ValueError(f"--expand {self.expand} and --no-expand are both given")

    def load(self, checkpoint: Path, device: str) -> PromptExpansion | None:
        """Return the model that expands prompts; ``None`` where they stay as they are.

        Raises ``ValueError`` naming ``--expand`` for a path without such a model.
        """
        path = self.expand or checkpoint.with_name(BESIDE)
        if self.no_expand or (self.expand is None and not path.is_file()):
            return None
        with naming("--expand"):
            if not path.is_dir():
                from sora_lightning.checkpoints import load_system  # imports Lightning
                from sora_lightning.systems.expansion import ExpansionSystem

                return load_system(ExpansionSystem, path).to(device).model
            expansion = LanguageModelExpansion(path, self.template, self.max_new_tokens)
        expansion.model.to(device)
        return expansion


def train_expansion(
    manifest: Path,
    output: Path,
    short: str = "caption",
    descriptive: str = "caption_descriptive",
    steps: int = 400,
    batch_size: int = 32,
    seed: int = 0,
) -> None:
    """Train a small language model that expands short prompts into descriptions.

    Args:
        manifest: Clips with short captions and descriptions; rows without one of them are left out.
        output: The checkpoint to write. As expansion.ckpt beside a text-to-video training's
            checkpoint it expands the prompts that are sampled from that.
        short: The column of short captions.
        descriptive: The column of descriptions.
        steps: Steps of the optimizer.
        batch_size: Pairs a step.
        seed: Seed of the weights and of the order of pairs.
    """
    import lightning as L  # here, since it takes seconds that no --help should wait for

    from sora_lightning.systems.expansion import ExpansionSystem

    filter_warnings()
    require_at_least(1, steps=steps, batch_size=batch_size)
    require_seed(seed)
    check_output(output)
    L.seed_everything(seed, verbose=False)
    pairs = read_pairs(manifest, short, descriptive)
    system = ExpansionSystem()
    system.model.bpe.train_on(itertools.chain.from_iterable(pairs))
    _check_context(system.model, manifest, pairs)
    order = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(pairs, True, steps * batch_size, order)
    loader: DataLoader = DataLoader(pairs, batch_size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
    trainer = L.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_model_summary=False,
        gradient_clip_val=1.0, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(system, loader)
    trainer.save_checkpoint(output, weights_only=True)
    loss = float(trainer.callback_metrics["train/loss"])
    print(f"{output}: {len(pairs)} pairs, {steps} steps, cross-entropy {loss:.3f} at the end")


def read_pairs(manifest: Path, short: str, descriptive: str) -> list[tuple[str, str]]:
    """Return every pair of a short caption and a description of one clip.

    Raises ``ValueError`` for a column that no row has, and where no row has both.
    """
    rows = list(read_texts(manifest))
    for flag, column in (("--short", short), ("--descriptive", descriptive)):
        if not any(row.columns.get(column) is not None for row in rows):
            known = ", ".join(sorted({name for row in rows for name in row.columns}))
            raise ValueError(f"{manifest}: no row has a column {flag} {column}; there are {known}")
    both = [r for r in rows if None not in (r.columns.get(short), r.columns.get(descriptive))]
    if not both:
        raise ValueError(f"{manifest}: no row has both columns, {short} and {descriptive}")
    pairs = (itertools.product(r.wordings(short)[0], r.wordings(descriptive)[0]) for r in both)
    return list(itertools.chain.from_iterable(pairs))


def _check_context(model: ExpansionModel, manifest: Path, pairs: list[tuple[str, str]]) -> None:
    """Raise ``ValueError`` naming the first pair beyond the context."""
    context = model.tower.context
    for short, long in pairs:
        num_tokens = sum(map(len, model.bpe.pieces([short, long]))) + 3
        if num_tokens > context:
            raise ValueError(
                f"{manifest}: {short[:40]!r} and its description {long[:40]!r} have {num_tokens} "
                f"tokens with three marks: at most {context}"
            )
