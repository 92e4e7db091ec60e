"""The cache gives back what was written, to the tokenizer that wrote it and to no other."""

from __future__ import annotations

import gc
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_lightning.data import ClipRecord, LatentCache
from sora_lightning.data.latents import latent_key
from sora_lightning.types import VideoSize


def key(number: int) -> str:
    return f"{number:032x}"


def filled(root: Path, dtype: str, count: int = 5) -> dict[str, torch.Tensor]:
    latents = {key(i): torch.randn(4, 1 + i, 3, 2) for i in range(count)}
    with LatentCache.create(root, "tokenizer-a", dtype) as cache:  # type: ignore[arg-type]
        for name, value in latents.items():
            cache.write(name, value)
    return latents


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2e-3)])
def test_what_is_read_is_what_was_written(dtype: str, error: float, tmp_path: Path) -> None:
    latents = filled(tmp_path, dtype)
    cache = LatentCache.open(tmp_path)
    assert len(cache) == len(latents)
    for copy in (cache, pickle.loads(pickle.dumps(cache))):
        for name, value in latents.items():
            read = copy.read(name)
            assert read.dtype is torch.float32
            torch.testing.assert_close(read, value, atol=error, rtol=error)
    with pytest.raises(KeyError):
        cache.read(key(99))


def test_a_second_run_adds_and_keeps_what_is_there(tmp_path: Path) -> None:
    latents = filled(tmp_path, "float32")
    with LatentCache.create(tmp_path, "tokenizer-a", "float32") as cache:
        assert key(0) in cache
        cache.write(key(0), torch.zeros(4, 1, 3, 2))
        cache.write(key(16**31), torch.ones(2, 1, 1, 1))
        torch.testing.assert_close(cache.read(key(16**31)), torch.ones(2, 1, 1, 1))
    cache = LatentCache.open(tmp_path)
    assert len(cache) == len(latents) + 1
    torch.testing.assert_close(cache.read(key(0)), latents[key(0)])


def test_the_shards_are_safetensors(tmp_path: Path) -> None:
    latents = filled(tmp_path, "float32", count=2)
    (shard,) = tmp_path.glob("*.safetensors")
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header[key(1)]["dtype"] == "F32"
    begin, end = header[key(1)]["data_offsets"]
    values = np.frombuffer(content[8 + length :][begin:end], "<f4")
    np.testing.assert_array_equal(values.reshape(header[key(1)]["shape"]), latents[key(1)].numpy())


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
        pytest.raises(ValueError, match="3e8: not finite in float16"),
    ):
        cache.write(key(1000), torch.full((1, 1, 1, 1), 1e6))


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


def test_a_latent_costs_few_bytes_and_is_found_by_its_number(tmp_path: Path) -> None:
    filled(tmp_path, "float16", count=3)
    names = [key(16**30 * (number % 256) + 1000 + number) for number in range(20_000)]
    size = {"dtype": "F16", "shape": [1, 1, 1, 1]}
    header = {name: {**size, "data_offsets": [2 * i, 2 * i + 2]} for i, name in enumerate(names)}
    text = json.dumps(header).encode()
    values = np.arange(20_000).astype("<f2").tobytes()
    (tmp_path / "more.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values)
    tracemalloc.start()
    cache = LatentCache.open(tmp_path)
    assert names[-1] in cache
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    print(f"{held / len(cache):.0f} bytes a latent")
    assert held < 50 * len(cache)
    assert len(cache) == 20_003
    indices = cache.find([names[7], key(9), names[100]])
    assert indices[1] == -1
    assert cache.window(indices, 0.2).item() == 7
    assert cache.window(indices, 1.0).item() == 100
    with pytest.raises(ValueError, match="latents of 'a b': a key is 32 hexadecimal digits"):
        cache.find(["a b"])


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    with LatentCache.create(tmp_path, "tokenizer") as cache:
        cache.write(key(0), torch.randn(4, 2, 3, 3))
    (shard,) = tmp_path.glob("*.safetensors")
    whole = shard.read_bytes()
    for damaged in (whole[:-8], whole[:20], b"", b"\xff" * 100, whole + b"more"):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{shard.name}: .* encode again"):
            LatentCache.open(tmp_path)
    shard.write_bytes(whole)
    cache = LatentCache.open(tmp_path)
    torch.testing.assert_close(cache.read(key(0)).shape, torch.Size([4, 2, 3, 3]))
    for damaged in (whole[:-100] + b"\xff" * 100, whole[:-8]):  # while it is used
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard.name}: latents at byte \d+ are damaged"):
            cache.read(key(0))
