"""Every command of the README and of the other pages is one that the programs accept."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import sora_lightning.__main__ as program
from sora_lightning.cli.functions import parse_function
from sora_lightning.cli.training import COMMANDS, PARSER, TrainingCLI

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    "sora_lightning/data/README.md",
)


class Parsed(Exception):
    """Raised in place of building what was parsed."""


class ParsingCLI(TrainingCLI):
    def before_instantiate_classes(self) -> None:
        raise Parsed


def parse(arguments: list[str]) -> None:
    """Parse a training's command. Raises ``Parsed`` where that is accepted."""
    ParsingCLI(
        arguments[0],
        subclass_mode_model=True,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        parser_kwargs={**PARSER, arguments[0]: dict(PARSER)},
        args=arguments,
    )


def _commands() -> list[str]:
    blocks = [
        block
        for page in _PAGES
        for block in re.findall(r"```sh\n(.*?)```", (_ROOT / page).read_text(), re.DOTALL)
    ]
    return [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines()]


def test_there_are_commands_to_check() -> None:
    assert {shlex.split(line)[0] for line in _commands()} == {"make", "sora-lightning"}


@pytest.mark.parametrize("line", [c for c in _commands() if c.startswith("make")])
def test_a_target_of_make_exists(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shlex.split(line)[1] in targets


@pytest.mark.parametrize("line", [c for c in _commands() if c.startswith("sora-lightning")])
def test_a_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_ROOT)
    _, command, *arguments = shlex.split(line)
    if command in COMMANDS:
        with pytest.raises(Parsed):
            parse([command, *arguments])
    else:
        module, function = program.FUNCTIONS[command]
        assert parse_function(command, getattr(import_module(module), function), arguments)


def test_the_table_of_commands_and_the_map_of_the_code_are_complete() -> None:
    text = (_ROOT / "README.md").read_text()
    assert re.findall(r"^\| `sora-lightning ([\w-]+)`", text, re.MULTILINE) == list(
        program.COMMANDS
    )
    tree = text.partition("## Map of the code")[2]
    for path in (_ROOT / "sora_lightning").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "torchvision_guard.py"):
            assert f" {path.name}" in tree, path.name


def test_the_readme_lists_every_experiment_and_fits_a_minute() -> None:
    text = (_ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and ".yaml`" in line]
    for yaml in _ROOT.glob("experiments/**/*.yaml"):
        assert any(f"{yaml.name}`" in row for row in rows), yaml
    assert len(text.splitlines()) <= 230


@pytest.mark.parametrize("page", _PAGES)
def test_a_link_of_a_page_leads_to_a_file(page: str) -> None:
    path = _ROOT / page
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("page", _PAGES)
def test_a_path_that_a_page_names_exists(page: str) -> None:
    named = re.findall(
        r"`((?:sora_lightning|evaluation|experiments|tests)/[\w./]+)`", (_ROOT / page).read_text()
    )
    assert [path for path in named if not (_ROOT / path).exists()] == []


def test_the_reading_order_names_functions_that_exist() -> None:
    text = (
        (_ROOT / "CONTRIBUTING.md").read_text().partition("## Reading order")[2].partition("## ")[0]
    )
    names = set(re.findall(r"`\.?([A-Za-z_]+(?:\.\w+)?)`", text))
    sources = "".join(
        (_ROOT / path).read_text() for path in re.findall(r"`(sora_[\w/]+\.py)`", text)
    )
    assert {"DiffusionSystem.training_step", "losses", "euler", "AdaLNBlock.forward"} <= names
    for name in names:
        for part in name.split("."):
            assert re.search(rf"(?:def|class) {part}\b", sources), name
