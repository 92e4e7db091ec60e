"""Files of weights: located by path, URL or environment variable, and checked by hash.

They are read without executing code.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from sora_lightning.files import check_archive

_DIGESTS = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
_SCHEMES = ("http", "https", "file")


def locate_weights(source: str, digest: str = "") -> Path:
    """Return the file of weights for ``source``: a path, a URL, or ``env:NAME``.

    ``env:NAME`` reads the path or URL from an environment variable. ``digest`` is ``sha256:...``,
    or ``git:...`` for the object id that git gives the file's content. A URL needs a digest, and
    its file is kept in the user's cache. Raises ``ValueError`` for a variable that is not set, a
    file that is missing or cannot be fetched, and, with both hashes, for content with another hash.
    """
    check_digest_form(digest)
    where = _from_environment(source) if source.startswith("env:") else source
    scheme = urllib.parse.urlsplit(where).scheme
    if scheme in _SCHEMES:
        return _fetched(where, digest)
    path = Path(where).expanduser()
    if not path.is_file():
        raise ValueError(f"weights {source!r}: {path} is not a file")
    if digest:
        check_digest(path, digest)
    return path


def locate_torchscript(source: str, digest: str) -> Path:
    """Return the file as ``locate_weights`` does. ``ValueError`` without a digest: it is code."""
    if not digest:
        raise ValueError(f"weights {source!r}: a TorchScript file is code and needs a digest")
    return locate_weights(source, digest)


def check_digest_form(digest: str) -> None:
    if digest and not _DIGESTS.fullmatch(digest):
        raise ValueError(
            f"digest {digest!r}: must be 'sha256:' and 64 hexadecimal digits, or 'git:' and 40"
        )


def check_digest(path: Path, digest: str) -> None:
    """Raise ``ValueError`` with both hashes if the file's content has another hash."""
    actual = digest_of(path, digest.partition(":")[0])
    if actual != digest:
        raise ValueError(f"{path}: is {actual}, and {digest} is expected")


def digest_of(path: Path, kind: str = "sha256") -> str:
    """Return ``sha256:...`` or ``git:...`` of a file's content, read in chunks."""
    # Git's object id is a SHA-1 of a short header and the content; it is not used for security.
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return f"{kind}:{digest.hexdigest()}"


def read_weights(path: Path) -> dict[str, Any]:
    """Return the mapping stored in a file of weights; only tensors and plain values are read.

    Raises ``ValueError`` for a file that is damaged or holds anything else.
    """
    content = read_tensors(path, "weights")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; weights are a mapping")
    return content


def read_tensors(path: Path, kind: str = "tensors") -> Any:
    """Return the content of a file written by ``torch.save``; only tensors and plain values are
    read.

    Raises ``ValueError`` for a file that is damaged or holds anything else.
    """
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged archive
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as {kind} ({reason})") from error


def unwrapped(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a mapping without the keys and prefixes added by trainers."""
    for key in ("state_dict", "model", "module"):
        if isinstance(content.get(key), dict):
            content = content[key]
    for prefix in ("module.", "model.", "i3d."):
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def load_exactly(module: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Load weights into a module with exactly the same keys and shapes.

    Raises ``ValueError`` naming the first key that is missing, unexpected, or of another shape.
    Counters of batch norms may be missing, since they are not used.
    """
    own = module.state_dict()
    for name in own:
        if name not in weights and not name.endswith("num_batches_tracked"):
            raise ValueError(f"{origin}: {name} is missing")
    for name, value in weights.items():
        if name not in own:
            raise ValueError(f"{origin}: {name} is unexpected; the network has no such weight")
        if value.shape != own[name].shape:
            raise ValueError(
                f"{origin}: {name} has shape {tuple(value.shape)}; "
                f"the network's has {tuple(own[name].shape)}"
            )
    module.load_state_dict(weights, strict=False)


def weights_sha256(module: nn.Module) -> str:
    """Return the sha256 of names, shapes and values of a module's state, on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Folder for downloaded weights, in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sora-lightning" / "weights"


def _from_environment(source: str) -> str:
    name = source.removeprefix("env:")
    if not (where := os.environ.get(name, "").strip()):
        raise ValueError(
            f"weights {source!r}: the environment variable {name} is not set; "
            "it must hold the path or URL of the file"
        )
    return where


def _fetched(url: str, digest: str) -> Path:
    if not digest:
        raise ValueError(f"weights {url!r}: a file from a URL needs a digest to be checked by")
    folder = cache_folder()
    path = folder / f"{digest.replace(':', '-')}-{Path(urllib.parse.urlsplit(url).path).name}"
    if path.is_file():
        check_digest(path, digest)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # A temporary name until the file is complete and checked, since ranks may download at once.
    unfinished = folder / f".{uuid4().hex}"
    try:
        with urllib.request.urlopen(url) as answer, unfinished.open("wb") as file:
            shutil.copyfileobj(answer, file)
        check_digest(unfinished, digest)
        unfinished.replace(path)
    except urllib.error.URLError as error:
        raise ValueError(f"weights {url!r}: cannot be fetched ({error.reason})") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path
