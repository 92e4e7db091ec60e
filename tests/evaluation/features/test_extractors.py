"""Inception, CLIP and VideoMAE agree with the public code that they stand for, weight by weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.features import Inception, VideoMAE, ViTSize
from evaluation.features.clip import Clip, spaced
from evaluation.features.resize import resize, to_square
from evaluation.features.videomae import VideoTransformer
from evaluation.features.weights import digest_of


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_frames_are_resized_as_clean_fid_does() -> None:
    build_resizer = pytest.importorskip("cleanfid.resize").build_resizer
    for height, width in ((40, 64), (320, 480)):
        frame = noise(height, width, 3)
        theirs = torch.from_numpy(build_resizer("clean")(frame.numpy())).permute(2, 0, 1)
        ours = resize(frame.permute(2, 0, 1)[None].float(), 299, 299, "bicubic-antialias")[0]
        assert float((theirs - ours).abs().max()) < 0.01


def test_tensorflow_1_resizes_from_the_corner() -> None:
    """By hand: 4 pixels from 2 stand at 0, 0.5, 1 and, clamped, 1.5; half-pixel code differs."""
    frames = torch.tensor([0.0, 100.0]).reshape(1, 1, 1, 2)
    assert resize(frames, 1, 4, "bilinear-tf1").flatten().tolist() == [0, 50, 100, 100]
    assert resize(frames, 1, 4, "bilinear").flatten().tolist() == [0, 25, 75, 100]
    down = torch.arange(6.0).reshape(1, 1, 6, 1)
    assert resize(down, 3, 1, "bilinear-tf1").flatten().tolist() == [0, 2, 4]


def test_filters_and_fits_differ_and_are_named() -> None:
    video = noise(1, 3, 2, 300, 480)
    squashed = to_square(video, 224, "bilinear", "squash")
    covered = to_square(video, 224, "bilinear", "cover")
    assert squashed.shape == covered.shape == (1, 3, 2, 224, 224)
    assert float((squashed - covered).abs().mean()) > 5
    smooth = to_square(video, 224, "bilinear-antialias", "squash")
    assert float((squashed - smooth).abs().mean()) > 1
    scaled = resize(video[:, :, 0].float(), 224, 359, "bilinear")
    assert torch.equal(covered[:, :, 0], scaled[..., 67 : 67 + 224])
    with pytest.raises(ValueError, match="filter 'nearest': must be one of"):
        to_square(video, 224, "nearest", "squash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fit 'pad': must be one of"):
        to_square(video, 224, "bilinear", "pad")  # type: ignore[arg-type]


def test_inception_takes_the_layers_of_a_torchscript_file(tmp_path: Path) -> None:
    class Layers(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3)).repeat(1, 683)[:, :2048, None, None]

    class File(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(File()).save(str(path))
    inception = Inception(str(path), digest_of(path))
    frames = noise(2, 3, 1, 20, 30)
    expected = resize(frames[:, :, 0].float(), 299, 299, "bicubic-antialias").mean(dim=(2, 3))
    assert torch.allclose(inception(frames)[:, :3], (expected - 128) / 128, atol=1e-4)
    wrapper = pytest.importorskip("cleanfid.inception_torchscript").InceptionV3W
    theirs = wrapper(str(tmp_path), download=False)
    pixels = resize(frames[:, :, 0].float(), 299, 299, "bicubic-antialias")
    assert torch.allclose(theirs(pixels), inception(frames), atol=1e-6)
    with pytest.raises(ValueError, match="needs a digest"):
        Inception(str(path))
    with pytest.raises(ValueError, match="takes single frames"):
        inception(noise(2, 3, 2, 20, 30))
    assert Inception("random").label == "inception-random"


def test_videomae_equals_the_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    size = ViTSize(side=28, num_frames=4, width=32, depth=2, num_heads=4, hidden=64, num_classes=5)
    config = transformers.VideoMAEConfig(
        image_size=28,
        patch_size=14,
        num_frames=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        layer_norm_eps=1e-6,
        use_mean_pooling=True,
        num_labels=5,
    )
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.2)
    ours = VideoTransformer(size).eval()
    ours.load_state_dict(_public_names(theirs.state_dict(), size.depth))
    # Their head without weights of its own gives the features back.
    theirs.classifier = torch.nn.Identity()
    video = torch.rand(2, 3, 4, 28, 28)
    with torch.no_grad():
        expected = theirs(pixel_values=video.transpose(1, 2)).logits
        assert torch.allclose(ours(video), expected, atol=2e-5)


def _public_names(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    embeddings = "videomae.embeddings.patch_embeddings.projection"
    named = {f"patch_embed.proj.{p}": state[f"{embeddings}.{p}"] for p in ("weight", "bias")}
    named |= {f"fc_norm.{p}": state[f"fc_norm.{p}"] for p in ("weight", "bias")}
    named |= {f"head.{p}": state[f"classifier.{p}"] for p in ("weight", "bias")}
    renamed = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for block in range(depth):
        theirs, ours = f"videomae.encoder.layer.{block}", f"blocks.{block}"
        for our_name, their_name in renamed.items():
            for part in ("weight", "bias"):
                named[f"{ours}.{our_name}.{part}"] = state[f"{theirs}.{their_name}.{part}"]
        attention = f"{theirs}.attention.attention"
        qkv = [state[f"{attention}.{name}.weight"] for name in ("query", "key", "value")]
        named[f"{ours}.attn.qkv.weight"] = torch.cat(qkv)
        named[f"{ours}.attn.q_bias"] = state[f"{attention}.query.bias"]
        named[f"{ours}.attn.v_bias"] = state[f"{attention}.value.bias"]
    return named


def test_videomae_reads_its_file_and_minds_its_length(tmp_path: Path) -> None:
    size = ViTSize(side=28, num_frames=4, width=32, depth=1, num_heads=4, hidden=64)
    path = tmp_path / "vit.pth"
    torch.save({"module": VideoTransformer(size).state_dict()}, path)
    videomae = VideoMAE(str(path), digest_of(path), published=True, size=size)
    # A small network is never the published one, whatever the protocol vouches for.
    assert videomae.label == "videomae-unverified"
    assert videomae(noise(2, 3, 4, 50, 60)).shape == (2, 32)
    with pytest.raises(ValueError, match="clips of 6 frames: VideoMAE takes 4"):
        videomae(noise(1, 3, 6, 28, 28))
    with pytest.raises(ValueError, match="patch must divide side"):
        ViTSize(side=30)


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return Clip(clip_folder, num_frames=3)


def test_clip_equals_the_models_own_output(clip: Clip, clip_folder: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    video, texts = noise(2, 3, 3, 32, 32), ["a red cat", "fog"]
    tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
    for index in range(2):
        pixels = clip.pixels(video[index].transpose(0, 1))
        with torch.no_grad():
            output = model(
                input_ids=tokens["input_ids"][index : index + 1],
                attention_mask=tokens["attention_mask"][index : index + 1],
                pixel_values=pixels,
            )
        cosines = 100 * F.normalize(output.image_embeds) @ F.normalize(output.text_embeds).T
        ours = clip.frame_scores(video, texts)[index]
        assert torch.allclose(ours, cosines[:, 0], atol=1e-4)


def test_clip_prepares_frames_as_the_models_own_processor(clip: Clip) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    frame = noise(1, 3, 48, 70)
    theirs = processor(frame[0].permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    levels = (clip.pixels(frame) - theirs).abs().amax() * 255 * 0.26
    assert float(levels) < 1.5  # one grey level, by the last bit of Pillow's weights


def test_long_captions_that_differ_late_in_what_is_read_get_different_scores(clip: Clip) -> None:
    """The marks take 2 of 12 places, so 10 letters are read. The texts differ from the fourth."""
    first, second = "abc" + 30 * "d", "abc" + 30 * "e"
    one, other = clip.embed_texts([first, second])
    assert float((one - other).abs().max()) > 1e-3
    assert clip.truncated([first, "abc"]) == [True, False]
    # What lies beyond the last place makes no difference.
    assert torch.allclose(one, clip.embed_texts(["abc" + 7 * "d" + "xyz"])[0], atol=1e-5)


def test_clip_refuses_what_is_no_video_and_no_text(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        clip.embed_videos(torch.rand(1, 3, 4, 32, 32))
    with pytest.raises(ValueError, match="must be uint8"):
        clip.embed_videos(noise(3, 4, 32, 32))
    with pytest.raises(ValueError, match="is empty"):
        clip.embed_texts(["a cat", " "])
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        Clip(tmp_path)


def test_clips_weights_are_checked(clip_folder: Path, tmp_path: Path) -> None:
    weights = clip_folder / "model.safetensors"
    digest = digest_of(weights)
    assert Clip(clip_folder, digest).label == "clip-vit-32-32"
    assert Clip(clip_folder).label == "clip-vit-32-32-unverified"
    assert Clip(clip_folder, random=True).label == "clip-vit-32-32-random"
    for one in clip_folder.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    (tmp_path / weights.name).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"and {digest} is expected"):
        Clip(tmp_path, digest)


def test_frames_are_spaced_over_the_whole_clip() -> None:
    assert spaced(17, 5) == [0, 4, 8, 12, 16]
    assert spaced(3, 8) == [0, 1, 2]
    assert spaced(9, 1) == [0]


def test_features_do_not_depend_on_the_batch(clip: Clip) -> None:
    videos = noise(4, 3, 5, 40, 48)
    alone = torch.cat([clip(video[None]) for video in videos])
    assert torch.allclose(clip(videos), alone, atol=1e-5)
