"""The text tower of a trained captioner as a text encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from sora_lightning.captioner.bpe import BOS, EOS, PAD
from sora_lightning.conditioning import FrozenTextEncoder
from sora_lightning.layers.fingerprint import fingerprint
from sora_lightning.systems.captioner import CaptionerSystem
from sora_lightning.types import Condition


class CaptionerText(FrozenTextEncoder):
    """Encodes captions with a captioner's text tower, frozen, which has learned them from videos.

    The pooled vector is the tower's CLS token. Captions beyond the captioner's context are cut
    before their end token; a warning says once how many are. Raises ``ValueError`` for a
    ``checkpoint`` that holds no captioner.
    """

    def __init__(self, checkpoint: Path):
        with torch.device("cpu"):  # also where a configuration is checked on the meta device
            captioner = CaptionerSystem.from_checkpoint(checkpoint).captioner
        tower, bpe = captioner.tower, captioner.bpe
        super().__init__(lambda: tower, tower.width, fingerprint(tower, bpe.get_extra_state()))
        self.checkpoint = Path(checkpoint)
        self._bpe = (bpe,)  # no submodule: its state is the captioner's

    def extra_repr(self) -> str:
        return f"checkpoint={str(self.checkpoint)!r}"

    def encode(self, captions: list[str]) -> Condition:
        (bpe,) = self._bpe
        pieces, room = bpe.pieces(captions), self.network.context - 2
        rule = f"the {room} tokens that the captioner's context has room for"
        self.warn_of_cut([len(one) for one in pieces], room, rule)
        rows = [torch.tensor([BOS, *one[:room], EOS]) for one in pieces]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        ids = ids.to(self.digest.device)
        tokens, cls = self.network(ids)
        return Condition(self.network.norm(tokens), ids != PAD, cls)
