"""Text encoders of transformers give what transformers' own classes give, for each caption by
itself; a checkpoint holds none of their weights and knows which encoder it was trained with.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sora_lightning.checkpoints import load_weights
from sora_lightning.conditioning import CachedText, PretrainedText, pretrained
from sora_lightning.types import Condition

transformers = pytest.importorskip("transformers")
from tests.conditioning.text_folders import change_config, clip_folder, t5_folder  # noqa: E402

CAPTIONS = ["red", "", "a red one"]
KINDS = pytest.mark.parametrize("kind", ["T5", "UMT5", "CLIP"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    t5 = {kind: t5_folder(root / kind, kind) for kind in ("T5", "UMT5")}
    return {**t5, "CLIP": clip_folder(root / "CLIP")}


def real(condition: Condition, clip: int) -> Tensor:
    return condition.tokens[clip, condition.mask[clip]]


def same(first: Condition, second: Condition) -> None:
    assert torch.equal(first.mask, second.mask)
    torch.testing.assert_close(first.tokens, second.tokens, rtol=0, atol=0)
    torch.testing.assert_close(first.pooled, second.pooled, rtol=0, atol=0)


def reference(kind: str, folder: Path, caption: str) -> tuple[Tensor, Tensor]:
    """Tokens and pooled vector of one caption without padding, by transformers alone."""
    name = {"CLIP": "CLIPTextModel"}.get(kind, f"{kind}EncoderModel")
    network = getattr(transformers, name).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        output = network(**tokenizer([caption], return_tensors="pt"))
    tokens = output.last_hidden_state[0]
    return tokens, output.pooler_output[0] if kind == "CLIP" else tokens.mean(0)


@torch.no_grad()
def test_tokens_before_clips_last_layer(folders: dict[str, Path]) -> None:
    encoder = PretrainedText(folders["CLIP"], dtype="float32", skipped_layers=1)
    network = transformers.CLIPTextModel.from_pretrained(folders["CLIP"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["CLIP"])
    output = network(**tokenizer(["red"], return_tensors="pt"), output_hidden_states=True)
    expected = network.final_layer_norm(output.hidden_states[-2])
    assert (expected - output.last_hidden_state).abs().max() > 1e-2
    torch.testing.assert_close(encoder(["red"]).tokens, expected)
    assert encoder.fingerprint != PretrainedText(folders["CLIP"], dtype="float32").fingerprint
    for kind, layers in (("CLIP", 2), ("T5", 1)):
        with pytest.raises(ValueError, match=f"skipped_layers = {layers}: must be 0, or of CLIP"):
            PretrainedText(folders[kind], skipped_layers=layers)


@KINDS
def test_each_caption_has_the_embedding_that_transformers_gives_it_alone(
    kind: str, folders: dict[str, Path]
) -> None:
    encoder = PretrainedText(folders[kind], dtype="float32")
    batch = encoder(CAPTIONS)
    for clip, caption in enumerate(CAPTIONS):
        tokens, pooled = reference(kind, folders[kind], caption)
        torch.testing.assert_close(real(batch, clip), tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.pooled[clip], pooled, atol=1e-5, rtol=0)
    assert encoder.width == batch.tokens.shape[-1] == 16


@KINDS
def test_a_dropped_caption_is_the_empty_one(kind: str, folders: dict[str, Path]) -> None:
    encoder = PretrainedText(folders[kind], dtype="float32")
    dropped, null = encoder(["red", "red"], torch.tensor([True, False])), encoder.null(1)
    torch.testing.assert_close(real(dropped, 0), real(null, 0))
    torch.testing.assert_close(dropped.pooled[:1], null.pooled)
    assert not torch.allclose(dropped.pooled[1], null.pooled[0], atol=1e-3)


@KINDS
def test_embeddings_are_computed_in_bfloat16_by_default(
    kind: str, folders: dict[str, Path]
) -> None:
    encoder, exact = PretrainedText(folders[kind]), PretrainedText(folders[kind], dtype="float32")
    assert encoder.network.dtype == torch.bfloat16
    coarse, fine = encoder(CAPTIONS), exact(CAPTIONS)
    assert coarse.tokens.dtype == coarse.pooled.dtype == torch.float32
    torch.testing.assert_close(real(coarse, 2), real(fine, 2), atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):  # the training's precision is not the encoder's
        torch.testing.assert_close(exact(CAPTIONS).tokens, fine.tokens)


@pytest.mark.parametrize(("kind", "max_tokens"), [("T5", 4), ("CLIP", None)])
def test_a_long_caption_is_cut_before_its_end_token_and_counted_once(
    kind: str, max_tokens: int | None, folders: dict[str, Path]
) -> None:
    encoder = PretrainedText(folders[kind], max_tokens=max_tokens, dtype="float32")
    words = "a red circle moves left"
    with pytest.warns(UserWarning, match=r"1 of 3 captions .*33%.* max_tokens = \d+ tokens, up to"):
        cut = encoder([words, "", "red"])
    kept = {"T5": "a red circle", "CLIP": "a red circle"}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(real(cut, 0), real(encoder([kept]), 0))
        encoder([words])


def test_the_encoder_neither_trains_nor_travels(folders: dict[str, Path]) -> None:
    encoder = PretrainedText(folders["T5"])
    assert not list(encoder.parameters())
    assert list(encoder.state_dict()) == ["digest"]
    encoder.train()
    assert not encoder.network.training
    assert not encoder(["red"]).tokens.requires_grad


def test_weights_trained_with_another_encoder_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder = PretrainedText(folders["T5"], dtype="float32")
    copied = shutil.copytree(folders["T5"], tmp_path / "copy")
    load_weights(PretrainedText(copied, dtype="float32"), encoder.state_dict(), "x.ckpt")
    others = [
        PretrainedText(t5_folder(tmp_path / "other", seed=1), dtype="float32"),
        PretrainedText(folders["T5"], dtype="bfloat16"),
        PretrainedText(folders["T5"], max_tokens=9, dtype="float32"),
    ]
    for other in others:
        assert other.fingerprint != encoder.fingerprint
        message = rf"with the text encoder {encoder.fingerprint[:12]}, and .*folder='.*'\) is "
        with pytest.raises(ValueError, match=message):
            load_weights(other, encoder.state_dict(), "x.ckpt")


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("config.json"), "holds no config.json of a text encoder"),
        (without("model.safetensors"), "holds no text encoder to read"),
        (without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer to read"),
        (
            lambda folder: change_config(folder, model_type="gpt2"),
            "holds a gpt2; a text encoder is",
        ),
        (
            lambda folder: change_config(folder, num_layers=3),
            "lacks weights of its text encoder, such as encoder",
        ),
    ],
)
def test_a_folder_that_is_no_encoder_is_named(
    spoil: Callable[[Path], object], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["T5"], tmp_path / "spoiled")
    spoil(folder)
    with pytest.raises(ValueError, match=f"{folder}: {message}"):
        PretrainedText(folder)


def test_the_tokenizer_may_lie_in_another_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["T5"], tmp_path / "text_encoder")
    without("tokenizer.json", "tokenizer_config.json")(folder)
    apart = PretrainedText(folder, tokenizer=folders["T5"])
    assert apart.fingerprint == PretrainedText(folders["T5"]).fingerprint


@torch.no_grad()
def test_padding_is_read_where_a_pipeline_lets_its_encoder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As LTX-Video's and CogVideoX's pipelines do; a cache keeps the padding, too."""
    plain = PretrainedText(folders["T5"], max_tokens=9, dtype="float32")
    padded = PretrainedText(folders["T5"], max_tokens=9, dtype="float32", padded=True)
    assert padded.fingerprint != plain.fingerprint
    captions = ["a red circle", "blue"]
    found = padded(captions)
    ids = padded.tokenizer(captions, padding="max_length", max_length=9, return_tensors="pt")
    expected = padded.network(ids["input_ids"]).last_hidden_state
    torch.testing.assert_close(found.tokens, expected)
    assert found.mask.sum(1).tolist() == [4, 2]
    assert (found.tokens[:, :2] - plain(captions).tokens[:, :2]).abs().max() > 1e-4
    cached = CachedText(padded, tmp_path)
    for _ in range(2):  # encoded, then read
        again = cached(captions)
        torch.testing.assert_close(again.tokens, expected)
        assert torch.equal(again.mask, found.mask)


@pytest.mark.parametrize("max_tokens", [1, 13])
def test_a_context_that_the_encoder_has_not_is_refused(
    max_tokens: int, folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=f"max_tokens = {max_tokens}: must be 2 to 12, the enc"):
        PretrainedText(folders["CLIP"], max_tokens=max_tokens)


@KINDS
def test_a_known_encoder_is_not_loaded_until_a_caption_is_new(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "encoder", tmp_path / "cache"
    shutil.copytree(folders[kind], folder)
    loaded = []

    def text_network(*arguments: object) -> object:
        loaded.append(arguments)
        return original(*arguments)  # type: ignore[arg-type]

    original = pretrained.text_network
    monkeypatch.setattr(pretrained, "text_network", text_network)
    first = CachedText(PretrainedText(folder, fingerprints=cache), cache).train()
    assert not cache.exists()  # a run that encodes nothing writes nothing
    expected = first(CAPTIONS)
    assert len(loaded) == 1
    encoder = PretrainedText(folder, fingerprints=cache)
    again = CachedText(encoder, cache)
    same(again(CAPTIONS), expected)
    assert (len(loaded), encoder.fingerprint) == (1, first.encoder.fingerprint)
    torch.testing.assert_close(again.state_dict(), first.state_dict())
    same(again(["a blue one"]), first(["a blue one"]))
    assert len(loaded) == 2
    other = PretrainedText(folder, fingerprints=cache, max_tokens=5)
    assert (len(loaded), other.fingerprint != encoder.fingerprint) == (3, True)
    change = next(folder.glob("*.safetensors"))
    os.utime(change, ns=(0, 0))  # weights that were written anew, equal or not
    assert PretrainedText(folder, fingerprints=cache).fingerprint == encoder.fingerprint
    assert len(loaded) == 4
