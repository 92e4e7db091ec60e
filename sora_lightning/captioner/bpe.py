"""Byte-level byte-pair encoding of captions (arXiv 1508.07909), by the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

# Ids that are no text. Those of byte pairs follow, so that no caption can spell one of these.
PAD, BOS, EOS, CLS = range(4)
NUM_SPECIAL = 4
NUM_BYTES = 256


class BytePairEncoding(nn.Module):
    """Captions to ids and back. Any text is encoded, in NFC, by pieces of UTF-8.

    Without weights: its state in a checkpoint is the library's JSON, a string. Until ``train`` or
    loading a state, it knows no vocabulary.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        if vocab_size < NUM_SPECIAL + NUM_BYTES:
            raise ValueError(
                f"vocab_size = {vocab_size}: must be at least {NUM_SPECIAL + NUM_BYTES}: "
                f"{NUM_BYTES} bytes and {NUM_SPECIAL} marks"
            )
        self.vocab_size = vocab_size
        self._bpe: Tokenizer | None = None

    @property
    def is_trained(self) -> bool:
        return self._bpe is not None

    def train_on(self, captions: Iterable[str]) -> None:
        """Learn the pairs that occur most often in these captions."""
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - NUM_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        self._bpe = bpe

    def pieces(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the ids of each caption, without begin and end."""
        encodings = self._trained().encode_batch([caption.strip() for caption in captions])
        return [[NUM_SPECIAL + piece for piece in one.ids] for one in encodings]

    def encode(self, captions: Sequence[str]) -> Int[Tensor, "b l"]:
        """Return ``BOS``, the caption, ``EOS``, and ``PAD`` up to the longest."""
        rows = [torch.tensor([BOS, *ids, EOS]) for ids in self.pieces(captions)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    def decode(self, ids: Int[Tensor, "b l"]) -> list[str]:
        """Return the texts up to ``EOS``. Bytes that are no UTF-8, and zeros, which no manifest may
        hold, become U+FFFD.
        """
        texts = []
        for row in ids.tolist():
            row = row[: row.index(EOS)] if EOS in row else row
            pieces = [i - NUM_SPECIAL for i in row if i >= NUM_SPECIAL]
            texts.append(self._trained().decode(pieces).replace("\0", "\ufffd").strip())
        return texts

    def get_extra_state(self) -> str:
        return "" if self._bpe is None else self._bpe.to_str()

    def set_extra_state(self, state: str) -> None:
        bpe = Tokenizer.from_str(state) if state else None
        if bpe is not None and bpe.get_vocab_size() > self.vocab_size - NUM_SPECIAL:
            raise ValueError(
                f"a vocabulary of {bpe.get_vocab_size()} byte pairs and {NUM_SPECIAL} marks does "
                f"not fit vocab_size = {self.vocab_size}: it is another captioner's"
            )
        self._bpe = bpe

    def _trained(self) -> Tokenizer:
        if self._bpe is None:
            raise ValueError(
                "the captioner has no vocabulary yet: train it, or load a checkpoint of one"
            )
        return self._bpe
