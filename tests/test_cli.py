"""The commands: one help for all, a suggestion for a wrong one, and errors of two kinds."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import sora_lightning
import sora_lightning.__main__ as program
from evaluation.metrics.intervals import wilson_interval
from sora_lightning.__main__ import main
from sora_lightning.cli.functions import parse_function
from sora_lightning.cli.sources import with_found_configs
from sora_lightning.files import find_config


def paint(output: Path, num_frames: int = 17, rate: float = 8.0) -> None:
    """A stand-in for a command that is a plain function."""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_one_help_lists_every_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "predict", "sample", "convert", "synthesize", "demo"):
        assert f"\n  {command} " in text


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == sora_lightning.__version__


def test_help_needs_neither_torch_nor_lightning() -> None:
    code = "import sys; from sora_lightning.__main__ import main; main(['--help']); "
    code += "assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_help_of_a_command_has_the_whole_first_paragraph(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["split", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "``train.jsonl`` and ``test.jsonl``: all rows of a file go to the same one." in text


def test_help_of_commands_does_not_wait_for_lightning() -> None:
    code = (
        "import sys; from contextlib import suppress; from sora_lightning.__main__ import main\n"
        "for command in ('index', 'split', 'synthesize', 'check', 'sample', 'train-expansion'):\n"
        "    with suppress(SystemExit): main([command, '--help'])\n"
        "    assert 'lightning' not in sys.modules, command\n"
        "print('all of them')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout.endswith("all of them\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["test"], "no such command: to measure on held-out clips, give them to validate as"),
        (["eval"], "no such command: `make eval CKPT=...`"),
        (["fit"], "model is missing: fit needs an experiment, e.g. --config experiments/demo/tok"),
        (["validate", "--run_dir=x"], "model is missing: validate needs an experiment"),
        (["fit", "--config=ablations/factorised"], "model has no class_path: a YAML that varies"),
        (["check", "--config=a", "--config=b"], "that varies it is given as --delta"),
        (["plan", "--config=a", "--config=b"], "that varies it is given as --delta"),
    ],
)
def test_a_command_without_what_it_needs_says_what_to_give(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_wrong_command_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smaple", "--checkpoint", "x"]) == 2
    assert capsys.readouterr().err == (
        "sora-lightning smaple: there is no such command. Did you mean sample?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--num_frame=3", "--output=x"],
            "--num_frame: no such argument. Did you mean --num-frames?",
        ),
        (["--num-frames=three", "--output=x"], "--num-frames = 'three': expected a whole number"),
        (["--num-frames=3"], "--output is missing"),
        (["--output=x", "stray"], "stray"),
    ],
)
def test_a_command_refuses_what_it_does_not_take(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is tested
        parse_function("paint", paint, arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["index", "--source=x", "--output=x", "--num-workers", "0"], "--num-workers 0: must be"),
        (["synthesize", "x", "--turns=0.1", "--edits"], "--turns 0.1, --edits True: edited shapes"),
        (["curves", "x", "--output=x.gif"], "--output x.gif: must end in .png or .svg"),
        (["synthesize", "x", "--num-workers=0"], "--num-workers 0: must be at least 1"),
        (["synthesize", "x", "--seed=-1"], "--seed -1: must be a whole number from 0 to"),
        (["demo", "--output=x", "--seed=-1"], "--seed -1: must be a whole number from 0 to"),
        (["frame-tasks", "--steps=0"], "--steps 0: must be at least 1"),
        (["curves", "nowhere", "--output=x.png"], "--folder nowhere: no event file below it"),
        (["index", "--source=x", "--output=x", "--num_workers=0"], "--num_workers 0: must be"),
        (["index", "--source=x", "--output=x", "--detector=none"], "one of own, pyscenedetect"),
        (["index", "--source=x", "--output=x", "--min-scenes=1"], "--min-scenes: no such argument"),
    ],
)
def test_a_function_that_refuses_a_value_names_the_flag(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_what_a_training_needs_is_named_with_what_to_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing has been run
    config = Path(__file__).parents[1] / "experiments/demo/text_to_video.yaml"
    assert main(["fit", "--config", str(config)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert any(line.startswith("data.manifest = 'runs/demo/data/train.jsonl': ") for line in lines)
    assert lines[-1] == f"What to run first stands at the head of {config}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--num-frames=9", "--num_frames=9"])
def test_dashes_and_underscores_are_the_same(flag: str) -> None:
    values = parse_function("paint", paint, ["--output=a-b_c.mp4", flag])
    assert values == {"output": Path("a-b_c.mp4"), "num_frames": 9, "rate": 8.0}


def test_the_help_writes_flags_with_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_function("paint", paint, ["--help"])
    text = capsys.readouterr().out
    assert "--num-frames" in text
    assert "--num_frames" not in text


@pytest.mark.parametrize("command", program.FUNCTIONS)
def test_every_flag_is_described(command: str) -> None:
    module, name = program.FUNCTIONS[command]
    parser = ArgumentParser()
    parser.add_function_arguments(getattr(import_module(module), name))
    assert not [flag.dest for flag in parser._actions if not flag.help]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(["--loud"], True), (["--loud=false"], False), (["--loud", "false"], False), ([], False)],
)
def test_a_switch_needs_no_value(arguments: list[str], value: bool) -> None:
    def play(loud: bool = False, rate: float = 8.0) -> None:
        """A stand-in for a command with a switch."""

    assert parse_function("play", play, [*arguments, "--rate=2"]) == {"loud": value, "rate": 2.0}


def test_a_defect_keeps_its_traceback_and_a_mistake_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: list[str]) -> None:
        int("three")  # a ValueError that nobody raised on purpose

    def strict(arguments: list[str]) -> None:
        parse_function("paint", paint, ["--outptu=x"])

    monkeypatch.setattr(program, "_command", lambda name: broken)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit"])

    def scored(arguments: list[str]) -> None:
        wilson_interval(2, 1)  # of the other package

    for refusing in (strict, scored):
        monkeypatch.setattr(program, "_command", lambda name, refusing=refusing: refusing)
        assert main(["fit"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "none.txt"
    monkeypatch.setattr(program, "_command", lambda name: lambda arguments: missing.read_text())
    assert main(["fit"]) == 2
    assert str(missing) in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["demo/tokenizer", "demo/tokenizer.yaml", "experiments/demo/tokenizer.yaml"]
)
def test_an_experiment_is_found_in_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = Path(__file__).parents[1] / "experiments/demo/tokenizer.yaml"
    assert find_config(Path(name)) == expected
    given = ["fit", "--config", name, f"--config={name}", "--seed_everything", "1"]
    found = ["fit", "--config", str(expected), f"--config={expected}", "--seed_everything", "1"]
    assert with_found_configs(given) == found
    assert find_config(Path("demo/tokeniser")) == Path("demo/tokeniser")
