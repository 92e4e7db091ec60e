"""The cache gives back what was written, to the tokenizer that wrote it and to no other."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_lightning.data import ClipRecord, LatentCache
from sora_lightning.data.latents import latent_key
from sora_lightning.types import VideoSize


def filled(root: Path, dtype: str, count: int = 5) -> dict[str, torch.Tensor]:
    latents = {f"key{i}": torch.randn(4, 1 + i, 3, 2) for i in range(count)}
    with LatentCache.create(root, "tokenizer-a", dtype) as cache:  # type: ignore[arg-type]
        for key, value in latents.items():
            cache.write(key, value)
    return latents


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2e-3)])
def test_what_is_read_is_what_was_written(dtype: str, error: float, tmp_path: Path) -> None:
    latents = filled(tmp_path, dtype)
    cache = LatentCache.open(tmp_path)
    assert len(cache) == len(latents)
    for copy in (cache, pickle.loads(pickle.dumps(cache))):
        for key, value in latents.items():
            read = copy.read(key)
            assert read.dtype is torch.float32
            torch.testing.assert_close(read, value, atol=error, rtol=error)
    with pytest.raises(KeyError):
        cache.read("never written")


def test_a_second_run_adds_and_keeps_what_is_there(tmp_path: Path) -> None:
    latents = filled(tmp_path, "float32")
    with LatentCache.create(tmp_path, "tokenizer-a", "float32") as cache:
        assert "key0" in cache
        cache.write("key0", torch.zeros(4, 1, 3, 2))
        cache.write("new", torch.ones(2, 1, 1, 1))
        torch.testing.assert_close(cache.read("new"), torch.ones(2, 1, 1, 1))
    cache = LatentCache.open(tmp_path)
    assert len(cache) == len(latents) + 1
    torch.testing.assert_close(cache.read("key0"), latents["key0"])


def test_the_shards_are_safetensors(tmp_path: Path) -> None:
    latents = filled(tmp_path, "float32", count=2)
    (shard,) = tmp_path.glob("*.safetensors")
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["key1"]["dtype"] == "F32"
    begin, end = header["key1"]["data_offsets"]
    values = np.frombuffer(content[8 + length :][begin:end], "<f4")
    np.testing.assert_array_equal(values.reshape(header["key1"]["shape"]), latents["key1"].numpy())


def test_another_tokenizer_or_number_format_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, "float16")
    with pytest.raises(ValueError, match="by tokenizer tokenizer-a, not by tokenizer-b"):
        LatentCache.create(tmp_path, "tokenizer-b", "float16")
    with pytest.raises(ValueError, match="in float16, not float32"):
        LatentCache.create(tmp_path, "tokenizer-a", "float32")
    with pytest.raises(ValueError, match="not by tokenizer-b"):
        LatentCache.open(tmp_path).require("tokenizer-b")
    LatentCache.open(tmp_path).require("tokenizer-a")
    with pytest.raises(ValueError, match="dtype = 'bfloat16'"):
        LatentCache.create(tmp_path / "other", "tokenizer-a", "bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no latent cache here"):
        LatentCache.open(tmp_path / "absent")


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    with (
        LatentCache.create(tmp_path, "a", "float16") as cache,
        pytest.raises(ValueError, match="large: not finite in float16"),
    ):
        cache.write("large", torch.full((1, 1, 1, 1), 1e6))


def test_a_key_stands_for_content_window_size_and_rate(tmp_path: Path) -> None:
    record = ClipRecord(tmp_path / "a.mp4", ("x",), "0" * 16)
    cut = ClipRecord(tmp_path / "a.mp4", ("x",), "0" * 16, start_s=1.0)
    size, wide = VideoSize(17, 32, 32), VideoSize(17, 24, 40)
    keys = [
        latent_key("content", record, size, 8.0, 0, 4),
        latent_key("changed", record, size, 8.0, 0, 4),
        latent_key("content", cut, size, 8.0, 0, 4),
        latent_key("content", record, wide, 8.0, 0, 4),
        latent_key("content", record, size, 12.0, 0, 4),
        latent_key("content", record, size, 8.0, 1, 4),
        latent_key("content", record, size, 8.0, 0, 2),
    ]
    assert len(set(keys)) == len(keys)
    assert latent_key("content", record, size, 8.0, 0, 4) == keys[0]
