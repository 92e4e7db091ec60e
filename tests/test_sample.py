"""Files that `sample` writes, keeps and refuses, by a system that paints its prompt's length."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from evaluation.inputs import read_entries
from sora_lightning.callbacks.samples import SampleVideos
from sora_lightning.cli.contact_sheet import contact_sheet, moving_sheet, save_animation
from sora_lightning.cli.functions import run_function
from sora_lightning.cli.sample import Request, sample, to_frames
from sora_lightning.data.decoding.readers import read_frames
from sora_lightning.denoisers import FeatureCaching
from sora_lightning.generation import GuidanceConfig, SamplingConfig
from sora_lightning.layers.patch import Patch
from sora_lightning.tokenizers import ConvTokenizer, Tiling
from sora_lightning.tokenizers.tiling import TiledTokenizer
from sora_lightning.types import Compression, VideoSize
from tests.hostile import HOSTILE

_PROMPTS = ["a red circle moves left", "a blue square", "a green triangle moves up"]


class Painter(nn.Module):
    """Stands for a DiffusionSystem: each video has one shade, decided by its seed."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = SimpleNamespace(compression=Compression(4, 8, 8), latent_channels=4)
        self.denoiser = SimpleNamespace(patch=Patch(1, 1, 1))
        self.conditioner = SimpleNamespace(unseen_words=lambda prompts: [])
        self.fps = 8.0
        self.training_sizes = (VideoSize(17, 32, 32), VideoSize(17, 24, 40), VideoSize(25, 32, 32))
        self.known_frames = SimpleNamespace(masks=[], needs_source=False)
        self.asked: list[str] = []

    def video_generator(self, sampling: SamplingConfig) -> Painter:
        self.sampling = sampling
        if sampling.tiling is not None:
            self.tokenizer = sampling.tiling(self.tokenizer)
        return self

    def videos(self, prompts: list[str], size: VideoSize, seeds: list[int]) -> Tensor:
        self.asked += prompts
        shades = torch.tensor(seeds).view(-1, 1, 1, 1, 1) / 10 - 0.5
        return shades.expand(-1, 3, size.num_frames, size.height, size.width).float()


@pytest.fixture
def painter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Painter:
    monkeypatch.chdir(tmp_path)
    painter = Painter()
    loader = SimpleNamespace(from_checkpoint=lambda path: painter)
    monkeypatch.setattr("sora_lightning.cli.load_for_task.DiffusionSystem", loader)
    Path("model.ckpt").write_bytes(b"weights")
    Path("prompts.txt").write_text("\n".join(_PROMPTS) + "\n\n")
    return painter


def _sample(**changes: object) -> None:
    arguments = {"output": "out", "prompts": "prompts.txt", "num_frames": 5, "batch_size": 2}
    flags = {"checkpoint": "model.ckpt", **arguments, **changes}
    argv = [
        f"--{key.replace('_', '-')}={value}" for key, value in flags.items() if value is not None
    ]
    run_function("sample", sample, argv)


def test_one_prompt_makes_one_file_of_the_size_asked(painter: Painter) -> None:
    request = Request(prompt=" a red circle ", size="16x24", num_frames=9, seed=3)
    sample(Path("model.ckpt"), Path("new/x.mp4"), request)
    video = read_frames(Path("new/x.mp4"))[0]
    assert video.shape == (9, 16, 24, 3)
    assert abs(int(video.mean()) - round((0.3 - 0.5 + 1) * 127.5)) <= 2
    assert painter.asked == ["a red circle"]


def test_prompts_make_a_folder_that_says_how_each_was_made(painter: Painter) -> None:
    _sample(seed=1)
    rows = [json.loads(line) for line in Path("out/prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == _PROMPTS
    assert rows[0]["path"] == "0000-a-red-circle-moves-left.mp4"
    assert [row["seed"] for row in rows] == [1, 2, 3]
    assert {row["fps"] for row in rows} == {8.0}
    assert all((Path("out") / row["path"]).is_file() for row in rows)
    assert Image.open("out/contact_sheet.png").format == "PNG"
    assert Image.open("out/contact_sheet.gif").format == "GIF"


def test_size_and_length_are_those_of_the_training_unless_others_are_asked_for(
    painter: Painter,
) -> None:
    row = {"path": "a.mp4", "caption": "a wide one", "height": 24, "width": 40}
    Path("wide.jsonl").write_text(json.dumps(row) + '\n{"caption": "any"}\n')
    sizes = {
        "training": {},
        "lower": {"size": "16x16"},
        "longer": {"num_frames": 25},
        "image": {"task": "image"},
    }
    for name, changes in sizes.items():
        _sample(prompts="wide.jsonl", output=name, **{"num_frames": None, **changes})
    assert _shown("training") == [("a wide one", "17x24x40"), ("any", "17x32x32")]
    assert [size for _, size in _shown("lower")] == ["17x16x16"] * 2
    assert [size for _, size in _shown("longer")] == ["25x24x40", "25x32x32"]
    assert [size for _, size in _shown("image")] == ["1x24x40", "1x32x32"]
    painter.training_sizes = ()
    for changes, flag in (({"size": "16x16"}, "--num-frames"), ({"num_frames": 5}, "--size")):
        with pytest.raises(ValueError, match=f"{flag} is missing: the checkpoint names no size"):
            _sample(output="new", **{"num_frames": None, **changes})


def test_an_interrupted_call_makes_only_what_is_missing(painter: Painter) -> None:
    _sample()
    record = Path("out/prompts.jsonl")
    complete = record.read_text()
    rows = complete.splitlines()
    record.write_text("\n".join([rows[0], rows[1][:20]]))  # killed while it wrote the second row
    painter.asked.clear()
    _sample()
    assert painter.asked == _PROMPTS[1:]
    assert record.read_text() == complete


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"num_steps": 3},
        {"guidance_scale": 1.0},
        {"num_frames": 9},
        {"sampler": "heun"},
        {"guidance_interval": "0.1,0.8"},
        {"guidance_rescale": 0.5},
        {"guidance_channels": 3},
        {"cache_interval": 2},
    ],
)
def test_a_folder_of_other_settings_is_refused_and_kept(
    painter: Painter, change: dict[str, object]
) -> None:
    _sample()
    before = Path("out/prompts.jsonl").read_text()
    with pytest.raises(ValueError, match="other settings"):
        _sample(**change)
    assert Path("out/prompts.jsonl").read_text() == before


def test_guidance_and_caching_reach_the_sampler_and_the_rows(painter: Painter) -> None:
    given = {"guidance_interval": "0.1,0.8", "guidance_rescale": 0.5, "guidance_channels": 3}
    _sample(**given, cache_interval=2)
    guidance = GuidanceConfig(interval=(0.1, 0.8), rescale=0.5, channels=3)
    assert painter.sampling == SamplingConfig(guidance=guidance, cache=FeatureCaching(2))
    row = json.loads(Path("out/prompts.jsonl").read_text().splitlines()[0])
    assert row["sampling"]["guidance"]["interval"] == [0.1, 0.8]
    assert row["sampling"] == json.loads(json.dumps(asdict(painter.sampling)))
    (entry, *_) = read_entries(Path("out/prompts.jsonl"))
    assert given.items() <= entry.sampling.items()
    _sample(output=Path("plain"))
    assert painter.sampling == SamplingConfig()


def test_a_folder_from_before_a_setting_existed_goes_on(painter: Painter) -> None:
    _sample()
    record = Path("out/prompts.jsonl")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    for row in rows:
        del row["task"], row["inputs"], row["sampling"]["cache"]
        del row["sampling"]["guidance"]["interval"]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    painter.asked.clear()
    _sample()
    assert not painter.asked
    with pytest.raises(ValueError, match="other settings"):
        _sample(cache_interval=2)


@pytest.mark.parametrize("line", ["[]", "3", '{"path": "other.mp4"}', '{"path": ["x"]}'])
def test_a_record_that_is_not_its_own_is_refused(painter: Painter, line: str) -> None:
    Path("out").mkdir()
    Path("out/prompts.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1: a video of other settings"):
        _sample()


def test_a_tile_makes_the_tokenizer_decode_by_tiles(painter: Painter) -> None:
    """And counts as another setting of the folder."""
    painter.tokenizer = ConvTokenizer(4, (8, 8), (True,), (True,), patch=4, blocks_per_level=1)
    _sample(output=Path("whole"))
    _sample(output=Path("tiled"), tile=96)
    assert isinstance(painter.tokenizer, TiledTokenizer)
    assert painter.tokenizer.tiling == Tiling(96)
    assert painter.tokenizer.tiling.num_shared == 24
    row = json.loads(Path("tiled/prompts.jsonl").read_text().splitlines()[0])
    assert row["sampling"]["tiling"] == {"tile": 96, "overlap": None}
    with pytest.raises(ValueError, match="other settings"):
        _sample(output=Path("whole"), tile=96)
    with pytest.raises(ValueError, match="tile = 100 is not a multiple of the 8 pixels of height"):
        _sample(output=Path("new"), tile=100, tiling_overlap=16)


def test_another_checkpoint_counts_as_other_settings(painter: Painter) -> None:
    _sample()
    Path("model.ckpt").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="other settings"):
        _sample()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": Path("none.ckpt")}, "--checkpoint none.ckpt: no such file"),
        ({"prompt": "a", "prompts": Path("prompts.txt")}, "either --prompt"),
        ({"prompts": None}, "either --prompt"),
        ({"prompts": None, "prompt": " ", "output": Path("x.mp4")}, "is empty"),
        ({"prompts": None, "prompt": "a"}, "ends in .mp4"),
        ({"prompts": Path("none.txt")}, "no such file"),
        ({"size": "30x32"}, "--size = '5x30x32': height 30 does not divide"),
        ({"size": "32"}, "--size = '32': must be height x width in pixels, e.g. 32x48"),
        ({"size": "17x32x32"}, "--size = '17x32x32': must be height x width"),
        ({"size": "32x32,0x32"}, "--size = '0x32': must be height x width"),
        ({"num_frames": 0}, "--num-frames 0: must be at least 1"),
        (
            {"task": "extend", "video": Path("model.ckpt")},
            r"--task extend: model.ckpt was not trained on known frames \(its known_frames has no",
        ),
        ({"output": Path("prompts.txt")}, "must be a folder"),
        ({"guidance_interval": "0.8"}, "--guidance-interval 0.8: must be two times"),
        ({"guidance_interval": "0.8,0.1"}, "0 <= LOW <= HIGH <= 1"),
        ({"guidance_interval": "low,1"}, "--guidance-interval = '.low,1.': expected tuple"),
        ({"guidance_rescale": 1.5}, "--guidance-rescale 1.5: must lie in"),
        ({"guidance_channels": 0}, "--guidance-channels 0: must be at least 1"),
        (
            {"guidance_scale": 1.0, "guidance_rescale": 0.5},
            "--guidance-rescale has no meaning with --guidance-scale 1: nothing is guided",
        ),
        ({"weak_model": Path("none.ckpt")}, "--weak-model none.ckpt: no such file"),
        (
            {"weak_model": Path("model.ckpt"), "guidance_channels": 3},
            "--guidance-channels has no meaning beside --weak-model",
        ),
        (
            {
                "task": "loop",
                "frame_guidance": 2.0,
                "guidance_interval": "0,0.9",
                "video": Path("model.ckpt"),
            },
            "--guidance-interval has no meaning beside --frame-guidance",
        ),
        ({"cache_interval": 0}, "--cache-interval 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"batch_size": -1}, "--batch-size -1: must be at least 1"),
        ({"sheet_rows": 0}, "--sheet-rows 0: must be at least 1"),
        ({"seed": 2**64}, f"--seed {2**64}: must be a whole number from 0 to {2**32 - 1}"),
        ({"seed": -1}, "--seed -1: must be a whole number from 0"),
        ({"device": "cuda:9"}, "--device cuda:9: cannot be used here"),
        ({"device": "gpu"}, "--device gpu: cannot be used here"),
        ({"task": "nothing"}, "--task nothing: must be one of text, image, animate"),
        ({"num_steps": 0}, "--num-steps 0: must be at least 1"),
        ({"resample_strength": 1.5}, "--resample-strength 1.5: must lie in"),
        ({"sampler": "none"}, "--sampler = 'none': expected"),
        ({"shift": 2.0, "time_grid_kind": "karras"}, "--shift 2.0: is for uniform times alone"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_made(
    painter: Painter, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        _sample(**changes)
    assert not painter.asked
    assert not Path("out").exists()


def _shown(folder: str = "out") -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in Path(folder, "prompts.jsonl").read_text().splitlines()]
    return [(row["prompt"], row["size"]) for row in rows]


def test_a_manifest_gives_captions_and_the_size_nearest_in_proportion(painter: Painter) -> None:
    rows = [
        {"path": "a.mp4", "caption": ["first", "second"], "height": 60, "width": 100},
        {"path": "b.mp4", "caption": "alone", "height": 100, "width": 60},
        {"path": "c.mp4", "caption": "no size"},
        {"path": "d.mp4", "text": "by its other name"},
        {"path": "e.mp4", "caption": [{"text": "weighted", "weight": 2}, {"text": "x"}]},
    ]
    Path("test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _sample(prompts="test.jsonl", size="32x32,24x40,40x24")
    assert _shown() == [
        ("first", "5x24x40"),
        ("alone", "5x40x24"),
        ("no size", "5x32x32"),
        ("by its other name", "5x32x32"),
        ("weighted", "5x32x32"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("clips.csv", "path,caption\r\na.mp4,a red circle\r\nb.mp4,a square\r\n", None),
        ("clips.jsonl", '{"caption": "a red circle"}\n{"caption": "a square"}\n', None),
        (
            "separated.jsonl",
            '{"caption": "one\u2028two\u0085three"}\n',
            ["one\u2028two\u0085three"],
        ),
        ("separated.txt", "one\u2028two\u0085three\n", ["one\u2028two\u0085three"]),
        ("marked.txt", "\ufeffa red circle\n\na square\n", None),
        ("umlaut.txt", "ein grüner Kreis\n", ["ein grüner Kreis"]),
    ],
)
def test_prompts_are_read_as_the_training_reads_captions(
    painter: Painter, name: str, content: str, prompts: list[str] | None
) -> None:
    Path(name).write_bytes(content.encode())
    _sample(prompts=name)
    assert [prompt for prompt, _ in _shown()] == (prompts or ["a red circle", "a square"])
    assert painter.asked == (prompts or ["a red circle", "a square"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"caption": "a"}\n{', r"--prompts x\.jsonl:2: not JSON"),
        ("x.jsonl", b'{"caption": "a"}\n{"path": "a"}', r"x\.jsonl:2: caption: must be"),
        ("x.jsonl", b'{"caption": "a"}\n[]', r"x\.jsonl:2: .*caption"),
        ("x.jsonl", b'{"caption": "a", "height": -32, "width": 32}', r"x\.jsonl:1: height = -32"),
        ("x.jsonl", b'{"caption": "a", "height": "32", "width": 32}', r"x\.jsonl:1: height = '32'"),
        ("x.json", b"[]", r"x\.json: must be a text file \(\.txt\) with a prompt a line, or a man"),
        ("x.txt", "grün".encode("latin-1"), r"x\.txt: not UTF-8 text"),
        ("x.txt", "red".encode("utf-16"), r"x\.txt: not UTF-8 text"),
        ("x.txt", b"\n\n", r"x\.txt: holds no prompt"),
    ],
)
def test_what_holds_no_prompts_is_named_with_its_line(
    painter: Painter, name: str, content: bytes, said: str
) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        _sample(prompts=name)
    assert not painter.asked


def test_frames_span_the_range_of_pixels() -> None:
    ends = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(1, 1, 5, 1, 1).expand(1, 3, 5, 1, 1)
    assert to_frames(ends)[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_the_moving_sheet_plays_every_video_and_holds_the_last_frame_of_short_ones(
    tmp_path: Path,
) -> None:
    colours = [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    short = np.stack([np.full((16, 16, 3), colour, np.uint8) for colour in colours[:2]])
    long = np.stack([np.full((16, 16, 3), colour, np.uint8) for colour in colours])
    save_animation(moving_sheet([short, long], ["one", "two words"]), tmp_path / "x.gif", fps=8.0)
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 3
        for frame, shown in enumerate([(0, 0), (1, 1), (1, 2)]):
            animation.seek(frame)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            assert animation.info["duration"] == (120 if frame < 2 else 1000)
            for colour in {colours[i] for i in shown}:
                same = (abs(pixels - colour).sum(-1) < 12).sum()
                assert same == shown.count(colours.index(colour)) * 160 * 160


def test_the_contact_sheet_shows_first_and_last_frame_of_every_row() -> None:
    first = np.zeros((5, 16, 16, 3), np.uint8)
    first[0], first[-1] = (255, 0, 0), (0, 0, 255)
    tall = np.full((9, 40, 24, 3), (0, 255, 0), np.uint8)
    sheet = np.asarray(contact_sheet([first, tall], ["one", "two words"], fps=8.0)).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0)):
        assert (sheet == colour).all(1).sum() >= 50 * 90
    with pytest.raises(ValueError, match="1 videos and 2 captions"):
        contact_sheet([first], ["one", "two"], fps=8.0)


@pytest.mark.parametrize("prompt", ["a\0b", "\ud800", "", " \n\u2003"])
def test_what_is_no_text_is_no_prompt(prompt: str, painter: Painter) -> None:
    with pytest.raises(ValueError, match=r"prompts\[0\] = "):
        SampleVideos([prompt], "1x8x8")
    Path("prompts.jsonl").write_text(json.dumps({"path": "x", "caption": prompt}))
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: caption"):
        _sample(prompts="prompts.jsonl")
    assert not Path("out").exists()


def test_files_of_samples_have_plain_names(painter: Painter) -> None:
    rows = [{"path": "../x.mp4", "caption": prompt} for prompt in HOSTILE]
    Path("hostile.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = set(Path().rglob("*"))
    _sample(prompts="hostile.jsonl", num_frames=1)
    written = {str(path) for path in set(Path().rglob("*")) - before}
    own = {"out", "out/prompts.jsonl", "out/contact_sheet.png", "out/contact_sheet.gif"}
    videos = written - own
    assert len(videos) == len(HOSTILE)
    assert all(re.fullmatch(r"out/\d{4}(-[a-z0-9-]{1,48})?\.mp4", one) for one in videos)
    found = [json.loads(line) for line in Path("out/prompts.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in found} == {prompt.strip() for prompt in HOSTILE}
    assert painter.asked
