"""Where the files lie that a manifest may name: in its own folder, or under a root that its reader
allows.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# Columns that say in what a clip lies that is no file by itself: the kind of thing, and the file in
# it that must be there.
HOLDERS = {"shard": ("tar file", ""), "litdata": ("folder of litdata", "index.json")}
_LOCAL = re.compile("^(file|local)://")
_NAMES = re.compile("[^\0\ud800-\udc7f\udd00-\udfff]*")
_PARENT = re.compile(r"(\.|%2e){2}", re.IGNORECASE)


class Roots:
    """The folder of a manifest, and the folder or address ``root`` that is allowed beside it.

    Links and ``..`` are resolved before a path is compared. An address, such as ``s3://``, is
    inside if ``root`` is an address that it begins with.
    """

    def __init__(self, manifest: Path, root: str | None = None) -> None:
        self.folder = manifest if manifest.is_dir() else manifest.parent
        self.root = root
        self._address = root if root is not None and is_address(root) else None
        local = () if root is None or self._address else (local_path(root),)
        self._insides = [_with_slash(os.path.realpath(one)) for one in (self.folder, *local)]
        self._real: dict[str, str] = {}

    def require(self, place: str, row: dict[str, Any]) -> None:
        """Raise ``ValueError`` naming ``place``, the row's file and line, for a file outside.

        The ``path`` of a clip in a shard is a name alone, and a ``source`` that is no file may say
        anything.
        """
        names = {key: row.get(key) for key in ("path", "source", *HOLDERS)}
        if any(names[key] is not None for key in HOLDERS):
            del names["path"]
        for key, name in names.items():
            if not isinstance(name, str) or not name or self.inside(name):
                continue
            if key == "source" and not (self.folder / name).exists():
                continue
            besides = "" if self.root is None else f", and of root = {self.root}"
            raise ValueError(
                f"{place}: {key} = {name!r}: lies outside of the manifest's folder "
                f"{self.folder}{besides}; to allow it, name a folder or address that holds it: "
                "data.reading.root in a training, --root in other commands"
            )

    def inside(self, name: str) -> bool:
        """Return True for a path or address that may be read; paths are relative to the folder."""
        if is_address(name):
            begin = None if self._address is None else _with_slash(self._address)
            if begin is None or not name.startswith(begin):
                return False
            rest = name.removeprefix(begin)
            # fsspec reads what follows "::" as another address.
            return "::" not in rest and not any(map(_PARENT.fullmatch, re.split(r"[/\\]", rest)))
        if not _NAMES.fullmatch(name):  # no file can be named so
            return False
        real = self._resolved(os.path.join(self.folder, local_path(name)))
        return any(real.startswith(inside) for inside in self._insides)

    def _resolved(self, path: str) -> str:
        """Return the path without links. Those of folders are resolved once, as manifests are
        long.
        """
        folder, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            return os.path.realpath(path)
        if folder not in self._real:
            self._real[folder] = _with_slash(os.path.realpath(folder))
        return self._real[folder] + name


def is_address(name: str) -> bool:
    """Return True for what is not a file of this machine, such as ``s3://bucket/clips.tar``."""
    return "://" in name and not _LOCAL.match(name)


def local_path(name: str) -> str:
    """Return the path that ``file://`` stands before."""
    return _LOCAL.sub("", name)


def _with_slash(path: str) -> str:
    return path.rstrip("/") + "/"
