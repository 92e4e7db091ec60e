"""The two text encoders of HunyuanVideo (arXiv 2412.03603, section 4.3)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sora_lightning.checks import import_optional
from sora_lightning.conditioning.frozen import FrozenTextEncoder
from sora_lightning.conditioning.known_fingerprints import KnownFingerprint
from sora_lightning.conditioning.pretrained import (
    PretrainedText,
    fingerprinted,
    text_config,
    text_network,
    text_tokenizer,
)
from sora_lightning.diffusers_folders import part_of_pipeline
from sora_lightning.types import Condition

_CLASSES = {"llama": "LlamaModel"}


class HunyuanVideoText(FrozenTextEncoder):
    """Encodes captions with a Llama, whose hidden states before its last two layers are the tokens,
    and with a CLIP, whose pooled vector is the pooled condition.

    A caption is inserted into the pipeline's prompt; tokens before it are cropped.

    Args:
        folder: Folder of the pipeline.
        max_tokens: Most tokens of a caption; those beyond are cut.
        dtype: Type that the embeddings are computed in.
        fingerprints: See ``PretrainedText``.

    Raises ``ValueError`` for a folder without these encoders, their weights or their tokenizers.
    """

    skipped_layers = 2

    def __init__(
        self,
        folder: Path,
        max_tokens: int = 256,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        fingerprints: Path | None = None,
    ):
        folder = Path(folder)
        llama = part_of_pipeline(folder, "text_encoder")
        config = text_config(llama, _CLASSES)
        tokenizer = text_tokenizer(part_of_pipeline(folder, "tokenizer"))
        second = part_of_pipeline(folder, "text_encoder_2")
        clip = PretrainedText(
            second, part_of_pipeline(folder, "tokenizer_2"), dtype=dtype, fingerprints=fingerprints
        )
        self.template, self.num_cropped = _prompt()
        options = json.dumps([max_tokens, dtype, self.template])
        facts = options, tokenizer.backend_tokenizer.to_str(), clip.fingerprint
        known = None
        if fingerprints is not None:
            known = KnownFingerprint.of(Path(fingerprints), repr(facts), llama)
        read = partial(text_network, llama, dtype, _CLASSES)
        load, digest = fingerprinted(read, known, *facts)
        super().__init__(load, config.hidden_size, digest, known)
        self.pooled_width = clip.width
        self.max_tokens, self.tokenizer, self.clip = max_tokens, tokenizer, clip

    def encode(self, captions: list[str]) -> Condition:
        """See ``FrozenTextEncoder``."""
        read = self.tokenizer(
            [self.template.format(caption) for caption in captions],
            padding=True,
            truncation=True,
            max_length=self.num_cropped + self.max_tokens,
            return_tensors="pt",
        ).to(self.digest.device)
        mask = read["attention_mask"]
        output = self.network(read["input_ids"], attention_mask=mask, output_hidden_states=True)
        tokens = output.hidden_states[-1 - self.skipped_layers][:, self.num_cropped :]  # b l d
        mask = mask[:, self.num_cropped :].bool()
        return Condition(tokens, mask, self.clip.encode(captions).pooled)


def _prompt() -> tuple[str, int]:
    """Return the pipeline's prompt around a caption, and the number of tokens before that."""
    name = "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video"
    prompt: Any = import_optional(name, "HunyuanVideoText").DEFAULT_PROMPT_TEMPLATE
    return prompt["template"], prompt["crop_start"]
