"""Text encoders of transformers from a folder: T5 (arXiv 1910.10683), UMT5 (arXiv 2304.09151) and
CLIP's text tower (arXiv 2103.00020).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sora_lightning.conditioning.frozen import FrozenTextEncoder
from sora_lightning.conditioning.known_fingerprints import KnownFingerprint
from sora_lightning.diffusers_folders import part_of_pipeline
from sora_lightning.layers.fingerprint import fingerprint
from sora_lightning.transformers_folders import (
    model_type,
    read_network,
    read_tokenizer,
    transformers_class,
)
from sora_lightning.types import Condition

_CLASSES = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
# Raffel et al., section 3.1.2: the length that T5 and UMT5 are trained at. Their positions are
# relative, so that configurations name none.
_T5_TOKENS = 512


class PretrainedText(FrozenTextEncoder):
    """Encodes captions with a T5, UMT5 or CLIP text encoder, frozen.

    The tokens are the last hidden states. The pooled vector is CLIP's own, the state at the end of
    the text; of T5 and UMT5 it is the mean of the tokens. Captions of more than ``max_tokens`` are
    cut by the tokenizer, which keeps the end token; a warning says once how many are.

    Args:
        folder: Configuration, weights and tokenizer, as transformers' ``save_pretrained`` writes
            them; or the folder of a diffusers pipeline, of which it is the first text encoder.
        tokenizer: Folder of the tokenizer, if it is another one.
        max_tokens: By default CLIP's context, or 512.
        dtype: Type that the embeddings are computed in. These models are used in bfloat16.
        skipped_layers: Number of CLIP's last layers that the tokens leave out; I2VGen-XL leaves out
            one. The final norm follows all the same.
        padded: Give each caption ``max_tokens`` tokens, and let the encoder attend to those of
            padding, as the pipelines of LTX-Video (128) and CogVideoX (226) do. The mask still says
            which tokens are the caption's.
        fingerprints: Folder that keeps the encoder's fingerprint, such as that of ``CachedText``.
            Weights are then read when a caption is to be encoded, or if files have changed.

    Raises ``ValueError`` for a folder without such an encoder, its weights or its tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Path | None = None,
        max_tokens: int | None = None,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        padded: bool = False,
        skipped_layers: int = 0,
        fingerprints: Path | None = None,
    ):
        self.folder = part_of_pipeline(Path(folder), "text_encoder")
        if tokenizer is None:
            tokenizer = part_of_pipeline(Path(folder), "tokenizer")
        config = text_config(self.folder, _CLASSES)
        most = getattr(config, "max_position_embeddings", None)
        self.max_tokens = max_tokens or most or _T5_TOKENS
        if self.max_tokens < 2 or self.max_tokens > (most or self.max_tokens):
            limit = f"2 to {most}, the encoder's context" if most else "at least 2"
            raise ValueError(f"max_tokens = {self.max_tokens}: must be {limit}")
        layers = config.num_hidden_layers if most else 1  # T5 has no such limit
        if not 0 <= skipped_layers < layers:
            limit = f"must be 0, or of CLIP below {layers}"
            raise ValueError(f"skipped_layers = {skipped_layers}: {limit}")
        tokenizer_of = text_tokenizer(Path(tokenizer))
        options = [self.max_tokens, dtype, *(["padded"] if padded else [])]
        options += [skipped_layers] if skipped_layers else []
        facts = json.dumps(options), tokenizer_of.backend_tokenizer.to_str()
        known = None
        if fingerprints is not None:
            known = KnownFingerprint.of(Path(fingerprints), repr(facts), self.folder)
        read = partial(text_network, self.folder, dtype, _CLASSES)
        load, digest = fingerprinted(read, known, *facts)
        super().__init__(load, config.hidden_size, digest, known)
        self.padded, self.skipped_layers = padded, skipped_layers
        self.tokenizer = tokenizer_of

    def extra_repr(self) -> str:
        return f"folder={str(self.folder)!r}"

    def encode(self, captions: list[str]) -> Condition:
        if not self._has_warned:
            lengths = [len(ids) for ids in self.tokenizer(captions, verbose=False)["input_ids"]]
            self.warn_of_cut(lengths, self.max_tokens, f"max_tokens = {self.max_tokens} tokens")
        read = self.tokenizer(
            captions,
            padding="max_length" if self.padded else True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.digest.device)
        mask = read["attention_mask"].bool()
        output = self.network(
            read["input_ids"],
            attention_mask=None if self.padded else read["attention_mask"],
            output_hidden_states=True,
        )
        tokens = output.last_hidden_state  # b l d
        if self.skipped_layers:
            tokens = self.network.final_layer_norm(output.hidden_states[-1 - self.skipped_layers])
        if "pooler_output" in output:
            return Condition(tokens, mask, output.pooler_output)
        real = mask[..., None].float()
        pooled = (tokens.float() * real).sum(1) / real.sum(1)
        return Condition(tokens, mask, pooled.to(tokens))


def fingerprinted(
    read: Callable[[], nn.Module], known: KnownFingerprint | None, *facts: str
) -> tuple[Callable[[], nn.Module], str]:
    """Return a function that returns the network, and its fingerprint with ``facts``, for which the
    network is read now if it is not ``known``.
    """
    on_meta = torch.empty(0).is_meta
    if known is not None and not on_meta and (digest := known.read()) is not None:
        return read, digest
    network = read()
    return lambda: network, fingerprint(network, *facts)


def text_config(folder: Path, classes: Mapping[str, str]) -> Any:
    """Return the configuration of a folder's text encoder, whose ``model_type`` is a key of
    ``classes``, the names of transformers' classes.

    Raises ``ValueError`` for another kind.
    """
    kind = model_type(folder, "text encoder", classes)
    config = transformers_class("AutoConfig").from_pretrained(folder, local_files_only=True)
    return config.text_config if kind == "clip" else config


def text_network(folder: Path, dtype: str, classes: Mapping[str, str]) -> Any:
    """Return the text encoder of a folder; see ``text_config``.

    Raises ``ValueError`` for another kind, and for missing weights.
    """
    name = classes[model_type(folder, "text encoder", classes)]
    if torch.empty(0).is_meta:  # where a configuration is checked, its widths alone are needed
        return transformers_class(name)(text_config(folder, classes))
    return read_network(folder, name, "text encoder", dtype=getattr(torch, dtype))


def text_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder. Raises ``ValueError`` where there is none that pads."""
    tokenizer = read_tokenizer(folder)
    if tokenizer.pad_token is None:
        raise ValueError(f"{folder}: its tokenizer has no token of padding")
    return tokenizer
