"""Commands that are killed at random moments leave no process behind, and finish when they are
started again: with what an uninterrupted call makes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import evaluation.__main__
from sora_lightning.__main__ import main
from sora_lightning.checkpoints import read_checkpoint
from sora_lightning.data import write_shards
from sora_lightning.data.latents import LatentCache
from tests.processes import Forks, require_none_left
from tests.systems.test_captioner import MODEL as CAPTIONER
from tests.systems.test_packed_training import PACKED

pytestmark = pytest.mark.slow

KILLS, STEPS = 14, 200
SHARDED = "sora_lightning.systems.parallel.ShardedStrategy"


class Command(NamedTuple):
    """A function with its arguments, what it writes to, and what the whole result is."""

    call: tuple[Any, ...]
    output: Path
    result: Callable[[], Any]


@pytest.fixture(scope="module")
def forks() -> Forks:
    return Forks()


def _latents(root: Path) -> dict[str, bytes]:
    cache = LatentCache.open(root)
    return {key: cache.read(key).numpy().tobytes() for key in sorted(cache.keys())}


def _shards(folder: Path) -> Any:
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    tars = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    return [{**row, "modified_ns": None} for row in rows], tars


@pytest.fixture(scope="module")
def command(
    fit: Callable[..., Path],
    experiment: Callable[..., Path],
    tokenizer_checkpoint: Path,
    tokenizer_model: dict[str, Any],
    diffusion_model: dict[str, Any],
    clips: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Path], Command]:
    """Return a command by its name, which works in a folder."""
    made = tmp_path_factory.mktemp("made")
    train, val = clips["train"], clips["val"]

    def sample(folder: Path) -> Command:
        last = made / "diffusion" / "checkpoints" / "last.ckpt"
        if not last.exists():
            fit({"model": diffusion_model}, made / "diffusion", "--trainer.max_steps=1")
        (folder / "prompts.txt").write_text("".join(f"a red circle {i}\n" for i in range(24)))
        call = ["sample", "--checkpoint", str(last), "--prompts", "prompts.txt", "--size", "16x16"]
        call += ["--num-frames", "5", "--num-steps", "20", "--output", "videos"]
        videos = folder / "videos"
        return Command((main, call), videos, lambda: _files(videos, "*.mp4"))

    def index(folder: Path) -> Command:
        output = folder / "all.jsonl"
        call = ["index", "--source", str(train.parent), "--output", str(output)]
        return Command((main, call), output, output.read_text)

    def encode(folder: Path) -> Command:
        yaml = experiment({"model": tokenizer_model}, folder / "run")
        call = ["predict", "--config", str(yaml), "--ckpt_path", str(tokenizer_checkpoint)]
        root = folder / "run" / "latents"
        return Command((main, call), root, lambda: _latents(root))

    def recaption(folder: Path) -> Command:
        last = made / "captioner" / "checkpoints" / "last.ckpt"
        if not last.exists():
            fit({"model": CAPTIONER}, made / "captioner", "--trainer.max_steps=6")
        yaml = experiment({"model": CAPTIONER, "data": {"val_manifest": None}}, folder / "run")
        output = train.with_name("killed.jsonl")
        call = ["predict", "--config", str(yaml), "--ckpt_path", str(last)]
        call += ["--captions.output", str(output), "--latents.root", "null"]
        return Command((main, call), output, output.read_text)

    def evaluate(folder: Path) -> Command:
        output = folder / "report"
        call = ["--checkpoint", str(tokenizer_checkpoint), "--reference", str(val)]
        call += [
            "--tokenizer.sizes",
            '["9x64x64"]',
            "--tokenizer.fps",
            "8",
            "--output",
            str(output),
        ]
        scores = output / "report.json"
        return Command((evaluation.__main__.main, call), output, lambda: _scores(scores))

    def shards(folder: Path) -> Command:
        output = folder / "shards"
        return Command((_write_shards, train, output), output, lambda: _shards(output))

    def reencode(folder: Path) -> Command:
        output, copies = folder / "all.jsonl", folder / "copies"
        call = ["index", "--source", str(train.parent), "--output", str(output)]
        call += ["--reencode_to", str(copies)]
        return Command((main, call), output, lambda: (output.read_text(), _files(copies, "*.mp4")))

    def synthesize(folder: Path) -> Command:
        root = folder / "rendered"
        call = ["synthesize", "--root", str(root), "--num_train", "24", "--num_val", "2"]
        call += ["--num_test", "2"]
        rows = root / "train.jsonl"
        return Command((main, call), root, lambda: (rows.read_text(), _files(root, "*.mp4")))

    def convert(folder: Path) -> Command:
        output = folder / "model"
        call = ["convert", "--source", "sora-lightning", "--target", "model", "--input"]
        call += [str(tokenizer_checkpoint), "--output", str(output)]
        return Command((_make, output, call), output, lambda: _files(output))

    of_name = {"sample": sample, "index": index, "encode": encode, "recaption": recaption}
    of_name |= {"evaluate": evaluate, "write_shards": shards, "convert": convert}
    of_name |= {"reencode": reencode, "synthesize": synthesize}
    return lambda name, folder: of_name[name](folder)


def _scores(path: Path) -> Any:
    report = json.loads(path.read_text())
    return {key: value for key, value in report.items() if key != "seconds"}


def _write_shards(manifest: Path, folder: Path) -> int:
    write_shards(manifest, folder, shard_bytes=2**14)
    return 0


def _make(output: Path, call: list[str]) -> int:
    """Run a command that refuses an output that exists."""
    return 0 if output.exists() else main(call)


def _files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    files = (path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _end(process: BaseProcess, folder: Path) -> None:
    process.join(300)
    assert process.exitcode == 0, (folder / "log").read_text()[-3000:]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    "name",
    [
        *("sample", "index", "reencode", "encode", "recaption"),
        *("evaluate", "write_shards", "convert", "synthesize"),
    ],
)
def test_a_command_that_is_killed_leaves_nothing_running_and_finishes_the_next_time(
    name: str,
    number: signal.Signals,
    command: Callable[[str, Path], Command],
    forks: Forks,
    tmp_path: Path,
) -> None:
    call, output, result = command(name, tmp_path)
    function, *arguments = call
    begun_s = time.monotonic()
    _end(forks.start(function, tmp_path, *arguments), tmp_path)
    duration_s = time.monotonic() - begun_s
    whole = result()
    assert whole
    _remove(output)
    draw = random.Random(f"{name} {number}")
    for _ in range(3):
        process = forks.start(function, tmp_path, *arguments)
        time.sleep(draw.uniform(0.1, duration_s))
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode in (0, -number, 128 + number)
        require_none_left(process.pid)
    for _ in range(2):  # the second time there is nothing left to do
        _end(forks.start(function, tmp_path, *arguments), tmp_path)
        assert result() == whole


def _as_rank(rank: int, port: int, call: list[str]) -> int:
    places = {"RANK": rank, "NODE_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (places | address).items()}
    return main([*call, "--trainer.devices=1", "--trainer.num_nodes=2"])


def _ranks(forks: Forks, folder: Path, call: list[str], strategy: str = "ddp") -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [*call, f"--trainer.strategy={strategy}"]
    return [forks.start(_as_rank, folder, rank, port, call) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["encode", "recaption"])
def test_two_ranks_of_which_one_is_killed_finish_the_next_time(
    name: str, rank: int, command: Callable[[str, Path], Command], forks: Forks, tmp_path: Path
) -> None:
    (_, call), output, result = command(name, tmp_path)

    def finish() -> Any:
        for process in _ranks(forks, tmp_path, call):
            _end(process, tmp_path)
        return result()

    def begun() -> bool:
        parts = output.parent.glob(f".{output.name}.captions-*")
        return (output / "index.json").exists() or any(parts)

    whole = finish()
    assert whole
    _remove(output)
    ranks = _ranks(forks, tmp_path, call)
    _wait_for(begun, ranks[rank], tmp_path)
    os.kill(ranks[rank].pid, signal.SIGKILL)  # type: ignore[arg-type]
    for process in ranks:  # the other does not wait for it
        process.join(60)
        assert not process.is_alive()
        assert process.exitcode
        require_none_left(process.pid)  # type: ignore[arg-type]
    assert finish() == whole
    assert finish() == whole  # nothing is left to do


def _wait_for(condition: Callable[[], bool], process: BaseProcess, folder: Path) -> None:
    while not condition():
        assert process.is_alive(), (folder / "log").read_text()[-3000:]
        time.sleep(0.0005)


@pytest.mark.parametrize("name", ["tokenizer", "diffusion", "diffusion, packed"])
def test_a_training_killed_again_and_again_ends_as_if_it_had_not_been(
    name: str,
    experiment: Callable[..., Path],
    tokenizer_model: dict[str, Any],
    diffusion_model: dict[str, Any],
    forks: Forks,
    tmp_path: Path,
) -> None:
    """Half of the kills hit a checkpoint while it is written; training goes on from the step that
    was saved last."""
    model = tokenizer_model if name == "tokenizer" else diffusion_model
    data = PACKED if "packed" in name else {}
    data = {**data, "reading": {"num_workers": 2}}
    data["batching"] = {**data.get("batching", {}), "steps_per_epoch": 100}

    def fit(run: Path, *flags: str) -> BaseProcess:
        path = experiment({"model": model, "data": data}, run)
        call = ["fit", "--config", str(path), f"--trainer.max_steps={STEPS}", *flags]
        return forks.start(main, tmp_path, call)

    _end(fit(tmp_path / "whole"), tmp_path)
    run = tmp_path / "killed"
    last, part = (run / "checkpoints" / name for name in ("last.ckpt", ".last.ckpt.part"))
    draw = random.Random(name)
    step, sessions = 0, []
    for kill in range(KILLS):
        process = fit(run, "--checkpoint.every_n_steps=1", *(["--ckpt_path=last"] if step else []))
        assert process.pid is not None
        sessions.append(process.pid)
        for _ in range(draw.randint(1, 3)):
            before = last.stat().st_mtime_ns if last.exists() else 0
            _wait_for(lambda: last.exists() and last.stat().st_mtime_ns > before, process, tmp_path)  # noqa: B023
        if kill % 2:
            _wait_for(part.exists, process, tmp_path)
        else:
            time.sleep(draw.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        saved = read_checkpoint(last)["global_step"]
        assert saved > step
        step = saved
    assert step < STEPS
    _end(fit(run, "--ckpt_path=last"), tmp_path)
    for session in sessions:
        require_none_left(session)
    found, expected = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (run, tmp_path / "whole")
    )
    for key in ("state_dict", "optimizer_states", "global_step"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    for key in ("ema", "Throughput"):
        states = (one["callbacks"][key] for one in (found, expected))
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_rank_killed_while_it_writes_its_part_of_a_checkpoint_leaves_the_one_before(
    experiment: Callable[..., Path], diffusion_model: dict[str, Any], forks: Forks, tmp_path: Path
) -> None:
    """Parts that no file names are never read, and the next checkpoint removes them."""
    data = {"batching": {"steps_per_epoch": 100}}
    strategy = json.dumps({"class_path": SHARDED, "init_args": {"save_shards": True}})

    def fit(run: Path, *flags: str) -> list[BaseProcess]:
        path = experiment({"model": diffusion_model, "data": data}, run)
        call = ["fit", "--config", str(path), "--checkpoint.every_n_steps=1", *flags]
        return _ranks(forks, tmp_path, [*call, "--trainer.max_steps=16"], strategy)

    for process in fit(tmp_path / "whole"):
        _end(process, tmp_path)
    folder = tmp_path / "killed" / "checkpoints"
    step, num_torn = 0, 0
    for kill in range(4):
        ranks = fit(tmp_path / "killed", *(["--ckpt_path=last"] if step else []))
        for _ in range(3):
            before = set(folder.glob("*.shards"))
            _wait_for(lambda: bool(set(folder.glob("*.shards")) - before), ranks[0], tmp_path)  # noqa: B023
        os.kill(ranks[kill % 2].pid, signal.SIGKILL)  # type: ignore[arg-type]
        for process in ranks:
            process.join(300)
            assert process.exitcode
            require_none_left(process.pid)  # type: ignore[arg-type]
        saved = read_checkpoint(folder / "last.ckpt")["global_step"]
        assert saved > step
        step = saved
        held = (torch.load(path, weights_only=True) for path in folder.glob("*.ckpt"))
        named = {one["shards"]["folder"] for one in held}
        num_torn += len({path.name for path in folder.glob("*.shards")} - named)
    assert num_torn
    for process in fit(tmp_path / "killed", "--ckpt_path=last"):
        _end(process, tmp_path)
    assert len(list(folder.glob("*.shards"))) == 2  # of last.ckpt and previous.ckpt
    found, expected = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")
        for name in ("killed", "whole")
    )
    for key in ("state_dict", "optimizer_states", "global_step"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    averages = [one["callbacks"]["ema"] for one in (found, expected)]
    torch.testing.assert_close(*averages, rtol=0, atol=0)
