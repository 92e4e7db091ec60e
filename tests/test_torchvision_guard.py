"""lightning must import beside a torchvision whose operators do not load, and other errors must not
be hidden."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
# What torchvision does as it is imported without its compiled operators: registers shape functions
# for both.
_WITHOUT_OPERATORS = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda dets, scores, iou_threshold: None)
from torchvision import part
"""


def _run(folder: Path, torchvision: str | None, code: str) -> subprocess.CompletedProcess[str]:
    if torchvision is not None:
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(torchvision)
        (folder / "torchvision" / "part.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(_ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=folder
    )


def test_without_the_guard_the_fake_torchvision_does_not_import(tmp_path: Path) -> None:
    done = _run(tmp_path, _WITHOUT_OPERATORS, "import torchvision")
    assert done.returncode
    assert "operator torchvision::nms does not exist" in done.stderr


def test_a_torchvision_without_operators_imports_and_stays_importable(tmp_path: Path) -> None:
    code = """
import sora_lightning, sys, gc
assert "torchvision.part" in sys.modules
gc.collect()
import torch
torch.ops.torchvision.nms, torch.ops.torchvision.qnms
from sora_lightning.torchvision_guard import make_torchvision_importable
assert make_torchvision_importable() is False  # a second call changes nothing
"""
    done = _run(tmp_path, _WITHOUT_OPERATORS, code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", ["RuntimeError('out of space')", "ImportError('no libcudart')"])
def test_any_other_failure_of_torchvision_is_shown(tmp_path: Path, error: str) -> None:
    fails_once = f"""
from pathlib import Path
if not Path("tried").exists():
    Path("tried").touch()
    raise {error}
"""
    done = _run(tmp_path, fails_once, "import sora_lightning")
    assert done.returncode
    assert error.split("'")[1] in done.stderr


def test_without_torchvision_the_guard_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sora_lightning, sys; assert not {'torch', 'lightning'} & set(sys.modules)"
    # -S keeps a torchvision that this environment may have installed out of sight.
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    subprocess.run([sys.executable, "-S", "-c", code], env=environment, check=True)
