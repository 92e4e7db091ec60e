"""Prompt expansion: short prompts become descriptions, such as the model was trained on (DALL-E 3,
section 3.4: test prompts are "upsampled").
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sora_lightning.captioner.attention import KeysValues
from sora_lightning.captioner.bpe import BOS, CLS, EOS, PAD, BytePairEncoding
from sora_lightning.captioner.decoding import Greedy
from sora_lightning.captioner.pretrained import load_pretrained
from sora_lightning.captioner.text import TextTower, caption_losses, select_rows
from sora_lightning.checks import require_at_least
from sora_lightning.layers.fingerprint import fingerprint
from sora_lightning.layers.transformer import TransformerSize

TEMPLATE = (
    "Describe the video that this prompt asks for in one detailed sentence, without adding other "
    "objects.\nPrompt: {prompt}\nDescription:"
)


class PromptExpansion(Protocol):
    """Writes a description of each prompt. ``fingerprint`` differs where descriptions do."""

    @abstractmethod
    def expand(self, prompts: Sequence[str]) -> list[str]: ...

    @abstractmethod
    def fingerprint(self) -> str: ...


class ExpansionModel(nn.Module):
    """A causal language model of pairs: ``BOS``, a short caption, ``CLS``, a description, ``EOS``.

    ``context`` is the largest number of tokens of a pair, these three included. Embedding and
    output share their weights.
    """

    def __init__(self, size: TransformerSize, vocab_size: int = 512, context: int = 128):
        super().__init__()
        self.bpe = BytePairEncoding(vocab_size)
        self.tower = TextTower(size, vocab_size, context)
        self.tower.cls.requires_grad_(False)  # nothing reads a whole pair

    def losses(self, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, " b"]:
        """Return the mean cross-entropy over the tokens of each pair's description."""
        short, long = (self.bpe.pieces(one) for one in zip(*pairs, strict=True))
        rows = [torch.tensor([BOS, *a, CLS, *b, EOS]) for a, b in zip(short, long, strict=True)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        places = torch.arange(1, ids.shape[1])
        given = torch.tensor([len(one) + 2 for one in short])[:, None]
        targets = ids[:, 1:].masked_fill(places < given, PAD)  # the prompt is not predicted
        device = self.tower.positions.device
        logits, _ = self.next_logits(ids[:, :-1].to(device), [])
        return caption_losses(logits, targets.to(device))[0]

    def next_logits(
        self, ids: Int[Tensor, "b m"], past: list[KeysValues]
    ) -> tuple[Float[Tensor, "b m v"], list[KeysValues]]:
        """Return the logits after each token, and the keys and values of all tokens so far."""
        x, now = self.tower.step(ids, past)
        return F.linear(self.tower.norm(x), self.tower.embedding.weight), now

    @torch.no_grad()
    def expand(self, prompts: Sequence[str]) -> list[str]:
        """Return the most probable description of each prompt, token by token.

        Raises ``ValueError`` for a prompt that leaves no room for one in the context.
        """
        device, context = self.tower.positions.device, self.tower.context
        pieces = self.bpe.pieces(prompts)
        for prompt, ids in zip(prompts, pieces, strict=True):
            if len(ids) + 3 > context:
                raise ValueError(
                    f"prompt {prompt[:60]!r}: has {len(ids)} tokens: the context of the model "
                    f"that expands prompts holds {context}, with three marks and the description"
                )
        by_length = sorted(range(len(prompts)), key=lambda index: len(pieces[index]))
        expanded = list(prompts)
        for _, group in groupby(by_length, key=lambda index: len(pieces[index])):
            indices = list(group)
            start = torch.tensor([[BOS, *pieces[index], CLS] for index in indices], device=device)
            texts = self.bpe.decode(Greedy(context)(_Prefix(self, start), ()))
            for index, text in zip(indices, texts, strict=True):
                expanded[index] = text or prompts[index]
        return expanded

    def fingerprint(self) -> str:
        """See ``PromptExpansion``."""
        return fingerprint(self)


@dataclass(frozen=True)
class _Prefix:
    """Pairs so far, and keys and values of all tokens but the last ones: a ``DecodingState``."""

    model: ExpansionModel
    ids: Int[Tensor, "b l"]
    past: tuple[KeysValues, ...] = ()

    @property
    def room(self) -> int:
        return self.model.tower.context - self.ids.shape[1]

    def next_logits(self) -> tuple[Float[Tensor, "b v"], _Prefix]:
        num_past = self.past[0][0].shape[2] if self.past else 0
        logits, now = self.model.next_logits(self.ids[:, num_past:], list(self.past))
        return logits[:, -1].float(), replace(self, past=tuple(now))

    def append(self, ids: Int[Tensor, " b"]) -> _Prefix:
        return replace(self, ids=torch.cat([self.ids, ids[:, None]], dim=1))

    def select(self, rows: Int[Tensor, " r"]) -> _Prefix:
        return replace(self, ids=self.ids[rows], past=tuple(select_rows(list(self.past), rows)))


class LanguageModelExpansion:
    """Expands prompts with a causal language model of transformers, by greedy decoding.

    ``template`` contains ``{prompt}``; for a model with a chat template it is a user's message.
    Raises ``ValueError`` for a folder without such a model, its weights or its tokenizer.
    """

    def __init__(self, folder: Path, template: str = TEMPLATE, max_new_tokens: int = 128):
        if "{prompt}" not in template:
            raise ValueError(f"template = {template!r}: must hold {{prompt}}")
        require_at_least(1, max_new_tokens=max_new_tokens)
        self.folder, self.template = Path(folder), template
        self.max_new_tokens = max_new_tokens
        self.model, self.tokenizer = load_pretrained(
            self.folder, "AutoModelForCausalLM", "AutoTokenizer", "language model"
        )

    @torch.no_grad()
    def expand(self, prompts: Sequence[str]) -> list[str]:
        """Return the model's answer for each prompt in one line; the prompt where there is none.

        Raises ``ValueError`` for a prompt that leaves no room for an answer in the context.
        """
        return [" ".join(self._answer(prompt).split()) or prompt for prompt in prompts]

    def _answer(self, prompt: str) -> str:
        text = self.template.replace("{prompt}", prompt)
        if self.tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.model.device)
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and ids.shape[1] + self.max_new_tokens > context:
            raise ValueError(
                f"prompt {prompt[:60]!r}: has {ids.shape[1]} tokens with the template, and "
                f"max_new_tokens = {self.max_new_tokens}: the context of {self.folder} holds "
                f"{context}"
            )
        pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        answer = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.max_new_tokens,
            do_sample=False, pad_token_id=pad,
        )  # fmt: skip
        return self.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """See ``PromptExpansion``."""
        settings = [self.template, self.max_new_tokens, self.tokenizer.get_vocab()]
        # Sorted: the order of a vocabulary differs from one loading of it to the next.
        return fingerprint(self.model, json.dumps(settings, sort_keys=True))
