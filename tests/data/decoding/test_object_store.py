"""Clips in shards behind an address are read by their bytes alone, each once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from sora_lightning.data import write_shards
from tests.data.decoding.test_shards import loader, rows

pytest.importorskip("aiohttp", reason="fsspec's http needs it")


class Store(ThreadingHTTPServer):
    """Serves ranges of a folder's files, and notes each."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Ranges)
        self.folder = folder
        self.reads: list[tuple[str, int, int]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Ranges(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        store = self.server
        assert isinstance(store, Store)
        content = (store.folder / self.path[1:]).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        first, last = map(int, asked.groups()) if asked else (0, len(content) - 1)
        part = content[first : last + 1]
        store.reads.append((self.path[1:], first, len(part)))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as store:
        Thread(target=store.serve_forever, daemon=True).start()
        yield store
        store.shutdown()


def test_an_object_store_is_asked_for_each_clip_once_and_for_its_bytes_alone(
    store: Store, shapes: dict[str, Path], tmp_path: Path
) -> None:
    manifest = write_shards(shapes["train"], tmp_path, 40_000)
    places = rows(manifest)
    remote = [{**row, "shard": f"{store.address}/{row['shard']}"} for row in places]
    (tmp_path / "remote.jsonl").write_text("".join(json.dumps(row) + "\n" for row in remote))
    of_both = (tmp_path / "remote.jsonl", manifest)
    served, local = (list(loader(one, False, (0, 1), root=store.address)) for one in of_both)
    for one, other in zip(served, local, strict=True):
        assert one.clip_ids == other.clip_ids
        assert torch.equal(one.pixels, other.pixels)
    asked = set(store.reads)
    assert len(asked) == len(store.reads) == len({clip for one in served for clip in one.clip_ids})
    assert asked <= {(row["shard"], row["offset"], row["size"]) for row in places}
