"""Decodes in a child process, so that a file that hangs or crashes a decoder costs one clip and
not the run.

decord loops endlessly on some valid files, and no thread can be stopped from outside. The child is
forked: it starts in milliseconds and shares the parent's memory, where a new interpreter would
import all of torch.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import os
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sora_lightning.checks import require_positive
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import PyAVReader, Reader
from sora_lightning.data.decoding.timeline import Timeline

CAN_FORK = hasattr(os, "fork")
FIRST_BUFFER_BYTES = 16 * 2**20
ITEMS_AHEAD = 4096


class DecoderFailed(DecodeError):
    """A call ended its process or ran out of memory. The message says how, and names no file."""


class _Array(NamedTuple):
    """An array at the start of the shared memory."""

    dtype: np.dtype
    shape: tuple[int, ...]


class _Answer(NamedTuple):
    value: Any
    error: Exception | None
    complaints: str


class SubprocessCaller:
    """A child process that runs one call after another, within ``timeout_s`` seconds each.

    The first call starts it, and the next one after a call that ended it. A caller that is pickled
    or inherited by a fork starts its own child. It is not thread-safe. Raises ``ValueError`` where
    processes cannot be forked.
    """

    def __init__(self, timeout_s: float) -> None:
        require_positive(timeout_s=timeout_s)
        if not CAN_FORK:
            raise ValueError("this system cannot fork processes: set decode_timeout_s to null")
        self.timeout_s = timeout_s
        self._num_bytes = FIRST_BUFFER_BYTES
        self._child: _Child | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
        """Return the function's value and what was written to stderr meanwhile.

        An array is not copied out of the memory shared with the child, unless one returned before
        still lies there. Raises what the function raises, and ``DecoderFailed`` where it takes too
        long, takes the process down, or finds no memory.
        """
        if self._child is None or self._child.owner != os.getpid():
            self._child = _Child(self._num_bytes, self.timeout_s)
        try:
            answer = self._child.answer(function, arguments)
        except DecoderFailed:
            self.close()
            raise
        if answer.error is not None:
            raise answer.error
        if isinstance(answer.value, np.ndarray) and answer.value.nbytes > self._num_bytes:
            self._num_bytes = 2 * answer.value.nbytes  # it came through the pipe, which is slow
            self.close()
        return answer.value, answer.complaints

    def close(self) -> None:
        """End the child, where there is one."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}


class _Child:
    """The parent's side of one process, its pipe and its shared memory.

    Arrays lie in one of two buffers: in the first, and are lent as they are; or,
    while what was lent last is still in use, in the second, and are copied.
    """

    def __init__(self, num_bytes: int, timeout_s: float) -> None:
        self.owner = os.getpid()
        self.timeout_s = timeout_s
        self.shared = mmap.mmap(-1, num_bytes), mmap.mmap(-1, num_bytes)
        self.lent: weakref.ref[np.ndarray] | None = None
        self.pipe, theirs = Pipe()
        with tempfile.TemporaryFile() as written:
            self.pid = os.fork()
            if not self.pid:
                try:
                    _serve(theirs, self.shared, written.fileno(), timeout_s)
                finally:
                    os._exit(1)
        theirs.close()
        self.stop = weakref.finalize(self, _stop, self.owner, self.pid, self.pipe)

    def answer(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Answer:
        buffer = 0 if self.lent is None or self.lent() is None else 1
        try:
            self.pipe.send((buffer, function, arguments))
            if not self.pipe.poll(self.timeout_s):
                raise DecoderFailed(f"took longer than {self.timeout_s:g} s and was stopped")
            answer: _Answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            _, status = os.waitpid(self.pid, 0)
            self.stop.detach()
            self.pipe.close()
            raise DecoderFailed(f"crashed the decoder ({_ending(status)})") from error
        if isinstance(answer.value, _Array):
            dtype, shape = answer.value
            flat = np.frombuffer(self.shared[buffer], dtype, int(np.prod(shape)))
            if buffer == 0:
                self.lent = weakref.ref(flat)  # every view of it, and every tensor, keeps it alive
            else:
                flat = flat.copy()
            return answer._replace(value=flat.reshape(shape))
        return answer


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _stop(owner: int, pid: int, pipe: Connection) -> None:
    pipe.close()
    if os.getpid() == owner:  # a fork of the owner has the same object, and not the right
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _serve(pipe: Connection, shared: Sequence[mmap.mmap], written: int, timeout_s: float) -> None:
    """Answer calls until the parent closes its end of the pipe."""
    # A signal to the whole group is for the parent, which would blame the clip for this one's end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # what the parent left is never collected here: it may close what it shares
    os.dup2(written, 2)
    os.dup2(written, 1)
    os.closerange(3, pipe.fileno())
    os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    while True:
        try:
            buffer, function, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        # Ends an endless call even where the parent that would stop it has died.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
        answer = _answer(function, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isinstance(answer.value, np.ndarray) and answer.value.nbytes <= len(shared[buffer]):
            array = answer.value
            place = np.frombuffer(shared[buffer], array.dtype, array.size).reshape(array.shape)
            place[...] = array
            answer = answer._replace(value=_Array(array.dtype, array.shape))
        pipe.send(answer)
        del answer


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Answer:
    value: Any = None
    error: Exception | None = None
    try:
        value = function(*arguments)
    except MemoryError:
        error = DecoderFailed("needs too much memory")
    except Exception as raised:
        error = raised
    length = os.fstat(2).st_size
    complaints = os.pread(2, length, 0).decode(errors="replace") if length else ""
    if length:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
    return _Answer(value, error, complaints)


def subprocess_map(
    function: Callable[[Any], Any], items: Iterable[Any], num_workers: int, timeout_s: float
) -> Iterator[Any]:
    """Yield ``function(item)`` of each item, in order, or the ``DecodeError`` in its place.

    A few thousand items are requested ahead. Each worker has a child process, where processes can
    be forked.
    """
    idle: SimpleQueue[Callable[..., Any]] = SimpleQueue()
    for _ in range(num_workers):
        idle.put(SubprocessCaller(timeout_s) if CAN_FORK else _in_this_process)

    def run(item: Any) -> Any:
        caller = idle.get()
        try:
            return caller(function, item)[0]
        except DecodeError as error:
            return error
        finally:
            idle.put(caller)

    with ThreadPoolExecutor(num_workers) as pool:
        coming = iter(items)
        while ahead := list(itertools.islice(coming, ITEMS_AHEAD)):
            yield from pool.map(run, ahead)


def _in_this_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    try:
        return function(*arguments), ""
    except MemoryError as error:
        raise DecoderFailed("needs too much memory") from error


class SubprocessReader(Reader):
    """Decodes by another reader in a child process, within ``timeout_s`` seconds a call.

    The child also captures stderr: decord conceals damage, which only the messages of its FFmpeg
    reveal. Frames that came with such a message are discarded and read again by ``PyAVReader``,
    which raises at damage.
    """

    def __init__(self, reader: Reader, timeout_s: float) -> None:
        self.reader = reader
        self.caller = SubprocessCaller(timeout_s)

    def timeline(self, path: Path) -> Timeline:
        return self._run(path, self.reader.timeline, path)[0]

    def read(
        self, path: Path, timeline: Timeline, indices: Sequence[int]
    ) -> UInt8[np.ndarray, "F H W 3"]:
        frames, complaints = self._run(path, self.reader.read, path, timeline, indices)
        if any(_tells_of_damage(line) for line in complaints.splitlines()):
            frames, _ = self._run(path, PyAVReader().read, path, timeline, indices)
        return frames

    def _run(self, path: Path, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
        try:
            return self.caller(function, *arguments)
        except DecoderFailed as error:
            raise DecodeError(f"{path}: {error}") from error


def _tells_of_damage(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("[swscaler")
