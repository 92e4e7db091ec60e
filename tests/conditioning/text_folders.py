"""Folders of tiny text encoders with random weights, as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    *("<pad>", "</s>", "<unk>", "a", "red", "green", "blue", "circle", "square", "moves"),
    *("left", "right", "up"),
]
_SPECIAL: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_SHAPE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def t5_folder(folder: Path, kind: str = "T5", seed: int = 0) -> Path:
    """A whole T5 or UMT5, decoder included, as they are published."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(WORDS), **_SHAPE)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(folder)
    words = _words()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    _save_words(words, folder)
    return folder


def gpt2_folder(folder: Path) -> Path:
    """A GPT-2 with a context of 32 tokens."""
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32}
    marks = {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=len(WORDS), initializer_range=0.5, **shape, **marks)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    _save_words(_words(), folder)
    return folder


def _words() -> Tokenizer:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def _save_words(words: Tokenizer, folder: Path) -> None:
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **_SPECIAL).save_pretrained(folder)


def words_tokenizer(*others: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of ``WORDS`` and other tokens."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_words(), **_SPECIAL)
    tokenizer.add_tokens([*others], special_tokens=True)
    return tokenizer


def llama_folder(folder: Path) -> Path:
    """A Llama without its head."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), num_hidden_layers=4, **shape)
    transformers.LlamaModel(config).save_pretrained(folder)
    _save_words(_words(), folder)
    return folder


def clip_folder(folder: Path, seed: int = 0, context: int = 12, projection: int = 8) -> Path:
    """A whole CLIP with both towers, and letters as tokens."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=context
    )
    tokenizer.save_pretrained(folder)
    text = {
        **{"vocab_size": len(names), "hidden_size": 16, "intermediate_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": context},
        **{"bos_token_id": names.index("<|startoftext|>"), "projection_dim": projection},
        **{
            "eos_token_id": names.index("<|endoftext|>"),
            "pad_token_id": names.index("<|endoftext|>"),
        },
    }
    vision = {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 16},
        **{"num_attention_heads": 2, "patch_size": 8, "projection_dim": projection},
    }
    towers = {"text_config": text, "vision_config": vision}
    config = transformers.CLIPConfig(**towers, projection_dim=projection)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
