"""Each kind of mistake in a configuration gets its key's full path and what would be right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from sora_lightning.cli.errors import at_its_key, refused_as
from sora_lightning.cli.explain import condense, explain_refusal
from sora_lightning.cli.geometry import check_size
from sora_lightning.cli.sources import merge, read_sources
from sora_lightning.layers.patch import Patch
from sora_lightning.trust import trust_only_known_packages
from sora_lightning.types import Compression, VideoSize


class Network(nn.Module):
    def __init__(self, channels: int, width: int = 8, layout: list[str] | None = None) -> None:
        super().__init__()


class Wide(Network):
    def __init__(self, channels: int, width: int = 64, gates: bool = True) -> None:
        super().__init__(channels, width)


class Model(nn.Module):
    def __init__(self, network: Callable[[int], Network], fps: float, rate: float = 0.1) -> None:
        super().__init__()


class Data:
    def __init__(self, manifest: Path, sizes: list[str]) -> None: ...


_BASE = f"""
model:
  class_path: {__name__}.Model
  init_args:
    network: {{class_path: {__name__}.Network, init_args: {{width: 16, layout: [joint]}}}}
data: {{manifest: clips.jsonl, sizes: [17x32x32]}}
"""


@pytest.fixture(autouse=True)
def _own_classes() -> None:
    trust_only_known_packages(__name__)


@pytest.fixture
def explain(tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: str, base: str = _BASE) -> str:
        config = tmp_path / "base.yaml"
        config.write_text(base)
        groups = {"model": nn.Module, "data": Data, "run_dir": Path}
        argv = ["--config", str(config), *arguments]
        return explain_refusal("REFUSED", argv, groups, linked=frozenset({"model.init_args.fps"}))

    return run


_NETWORK = "--model.init_args.network"


@pytest.mark.parametrize(
    ("argument", "path", "right"),
    [
        ("--dat.sizes=1", "dat:", "Did you mean data?"),
        ("--data.size=1", "data.size:", "Did you mean sizes?"),
        ("--model.init_args.rat=1", "model.init_args.rat:", "Did you mean rate?"),
        ("--model.rat=1", "model.init_args.rat:", "Did you mean rate?"),
        (f"{_NETWORK}.init_args.widht=3", f"{_NETWORK}.init_args.widht:", "Did you mean width?"),
        (f"{_NETWORK}.init_arg=3", f"{_NETWORK}.init_args.init_arg:", "It takes layout, width"),
        ("--model.init_args.rate=fast", "model.init_args.rate = 'fast'", "expected a number"),
        ("--data.sizes=3", "data.sizes = '3'", "expected list[str]"),
        (f"{_NETWORK}.init_args.width=1.5", "init_args.width = '1.5'", "a whole number"),
        (f"--model.class_path={__name__}.Modle", "model.class_path", "Did you mean Model?"),
        ("--model.class_path=sora_lightnin.x.Y", "model.class_path", "no module sora_lightnin.x"),
        (f"--model.init_args.network={__name__}.Data", "model.init_args.network", "missing"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line(
    explain: Callable[..., str], argument: str, path: str, right: str
) -> None:
    sentence = explain(argument)
    assert path.removeprefix("--") in sentence
    assert right in sentence


def test_a_mistake_in_a_file_names_the_file(explain: Callable[..., str], tmp_path: Path) -> None:
    delta = tmp_path / "delta.yaml"
    delta.write_text("model: {init_args: {network: {init_args: {width: thick}}}}")
    sentence = explain("--config", str(delta))
    assert sentence.startswith(
        "model.init_args.network.init_args.width = 'thick': expected a whole number"
    )
    assert str(delta) in sentence


def test_a_missing_key_is_named_and_a_linked_one_is_not_missed(explain: Callable[..., str]) -> None:
    assert explain(base=_BASE.replace("manifest: clips.jsonl, ", "")).startswith(
        "data.manifest is missing"
    )
    assert explain() == "REFUSED"  # nothing wrong: fps is linked, channels are given by position


def test_a_class_of_another_kind_is_refused(explain: Callable[..., str]) -> None:
    sentence = explain(
        f"--model.init_args.network={__name__}.Model",
        base=_BASE.replace("width: 16, layout: [joint]", ""),
    )
    assert "model.init_args.network" in sentence


def test_changing_the_class_drops_what_the_new_one_does_not_take() -> None:
    base = {"class_path": f"{__name__}.Network", "init_args": {"width": 16, "layout": ["joint"]}}
    merged = merge(base, {"class_path": f"{__name__}.Wide", "init_args": {"gates": False}})
    assert merged["init_args"] == {"width": 16, "gates": False}


def test_later_sources_override_earlier_ones(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("a: {b: 1, c: 1}")
    two.write_text("a: {b: 2}")
    merged: dict[str, object] = {}
    for source in read_sources(["-c", str(one), f"--config={two}", "--a.c", "3", "--flag"]):
        merged = merge(merged, source.values)
    assert merged == {"a": {"b": 2, "c": "3"}, "flag": ""}


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [1", "line 2: not YAML"), ("- a", "expected keys and values, found list")],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str, said: str) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"{text}\n")
    with pytest.raises(ValueError, match=said) as caught:
        read_sources(["--config", str(broken)])
    assert str(broken) in str(caught.value)


def test_a_misspelt_file_is_answered_with_the_one_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiments/demo").mkdir(parents=True)
    Path("experiments/demo/tokenizer.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match=r"Did you mean experiments/demo/tokenizer\.yaml"):
        read_sources(["--config", "experiments/demo/tokeniser.yaml"])


def test_condensing_leaves_what_is_wrong() -> None:
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'A'>, <class 'NoneType'>]
  Errors:
    - Option 'x' is not accepted.
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""
    assert condense(message) == "Parser key \"model\": Option 'x' is not accepted."


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("num_heads = 7: must divide 32", "model.size.num_heads = 7: must divide 32"),
        ("sizes = ['1x8x8']: must be two", "data.sizes = ['1x8x8']: must be two"),
        ("decay = 2.0: must lie", "callbacks[1].decay = 2.0: must lie"),
        ("data.seed = 1: must be 0", "data.seed = 1: must be 0"),
        ("seed = 1: must be 0", None),  # of the model or of the data
        ("heads = 7: must be even", None),  # no whole name
        ("num_heads = 8: must be odd", None),  # a value from elsewhere
        ("num_heads must be odd", None),
    ],
)
def test_a_constructors_message_names_the_only_key_it_can_mean(
    message: str, expected: str | None
) -> None:
    model = {"size": {"num_heads": 7}, "seed": 1}
    data = {"sizes": ["1x8x8"], "seed": 1}
    config = {"model": model, "data": data, "callbacks": [{"decay": 0.5}, {"decay": 2.0}]}
    assert at_its_key(message, config) == expected


@pytest.mark.parametrize("patch", [Patch(1, 1, 1), Patch(1, 2, 2), Patch(2, 1, 1), Patch(3, 2, 1)])
def test_a_size_is_refused_exactly_when_it_cannot_be_cut_and_the_advice_can(patch: Patch) -> None:
    compression = Compression(4, 8, 8)
    for frames in (1, 5, 9, 16, 17, 21, 33):
        for height, width in ((8, 8), (16, 16), (24, 16), (30, 32), (4, 40)):
            size = VideoSize(frames, height, width)
            if _fits(size, compression, patch):
                check_size("data.batching.sizes[0]", size, compression, patch)
                continue
            with pytest.raises(
                ValueError, match=rf"^data\.batching\.sizes\[0\] = '{size}'"
            ) as caught:
                check_size("data.batching.sizes[0]", size, compression, patch)
            advice = str(caught.value).partition("The nearest that fit: ")[2].split(" or ")
            assert all(_fits(VideoSize.parse(one), compression, patch) for one in advice)


def _fits(size: VideoSize, compression: Compression, patch: Patch) -> bool:
    try:
        latents = compression.grid(size)
        patch.grid(latents.f, latents.h, latents.w)
    except ValueError:
        return False
    return True


def test_what_is_refused_is_told_in_our_words_with_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from sora_lightning.diffusers_folders import read_network
    from tests.denoisers.pipelines import network

    network("Wan").save_pretrained(tmp_path / "wan")
    network("LTX").save_pretrained(tmp_path / "ltx")
    (weights,) = (tmp_path / "ltx").glob("*.safetensors")
    shutil.copy(weights, tmp_path / "wan")
    said = rf"^model: {tmp_path}/wan: the weights cannot be read: "
    with pytest.raises(ValueError, match=said), refused_as("model"):
        read_network(tmp_path / "wan", "WanTransformer3DModel")
