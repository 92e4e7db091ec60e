"""A process that serves an Arrow manifest as a training does, and says what it held meanwhile:
``python -m tests.data.manifest.served_rows FILE dense|packed``.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from pathlib import Path

from sora_lightning.data import Packing
from tests.data.modules import data_module

SETTINGS = {
    "dense": {"sizes": ["9x32x32", "17x32x32"], "pixels_per_batch": 8 * 17 * 32 * 32},
    "packed": {"packing": Packing(4096, "4x4x4", 17, 32 * 40, (1, 4, 4))},
}


def memory() -> dict[str, float]:
    """Return the process's own memory (RssAnon), that of files, and their sum, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = dict(
        line.split(":") for line in lines if line.startswith(("RssAnon", "RssFile", "VmRSS"))
    )
    return {name: int(value.split()[0]) / 1024 for name, value in held.items()}


def serve(path: Path, mode: str) -> dict[str, float]:
    """Set up, plan a pass, and look up the clips of 50 batches."""
    data = data_module(path, **SETTINGS[mode], filters=["motion > 0.1"], steps_per_epoch=50)
    data.setup("fit")
    loader = data.train_dataloader()
    for request in itertools.islice(loader.sampler, len(loader.sampler)):
        clips = loader.dataset.clips
        records = (clips[request.size] if mode == "dense" else clips).records
        assert all(records[number].captions for number in request.clips)
    return memory()


def watch(peak: dict[str, float], done: threading.Event) -> None:
    while not done.wait(0.005):
        peak |= {name: max(peak.get(name, 0.0), held) for name, held in memory().items()}


if __name__ == "__main__":
    peak: dict[str, float] = {}
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    started = time.monotonic()
    try:
        final = serve(Path(sys.argv[1]), sys.argv[2])
    finally:
        done.set()
        watcher.join()
    print(json.dumps({"final": final, "peak": peak, "seconds": time.monotonic() - started}))
