"""Two real processes (gloo) that the tests of a module share."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch

PATIENCE_S = 900.0


class Pair:
    """Two ranks that live from run to run, since they take longer to import torch than to train."""

    def __init__(self) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(2):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=_rank, args=(rank, port, theirs)))
            self.processes[-1].start()
            theirs.close()

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a module's function on both. Fails with the first error of a rank, or where one
        takes too long.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, *arguments))
        training = list(self.pipes)
        while training:
            ended = wait(training, PATIENCE_S)
            problem = "" if ended else f"a rank has trained for {PATIENCE_S} s"
            for pipe in ended:
                problem = problem or pipe.recv()  # type: ignore[attr-defined]
                training.remove(pipe)  # type: ignore[arg-type]
            if problem:
                self.stop(patience_s=0)
                pytest.fail(problem)

    def stop(self, patience_s: float) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join(patience_s)
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


def _rank(rank: int, port: int, pipe: Connection) -> None:
    places = {"RANK": rank, "NODE_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    # A spawned process spawns its loaders' workers too, and each would import torch anew; the ranks
    # that torchrun starts fork them.
    multiprocessing.set_start_method("fork", force=True)
    with contextlib.suppress(EOFError):  # the tests have ended
        while True:
            function, *arguments = pipe.recv()
            # Again for each run: Lightning takes some of it out of the environment at the end.
            os.environ |= {name: str(value) for name, value in (places | address).items()}
            faulthandler.dump_traceback_later(PATIENCE_S / 2)
            try:
                function(*arguments)
                pipe.send("")
            except Exception:
                pipe.send(f"rank {rank}: {traceback.format_exc()}")
            faulthandler.cancel_dump_traceback_later()
