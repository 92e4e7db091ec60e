"""The data engine needs no network and no torchvision: its tests pass without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCHVISION = """
import socket, sys

sys.modules["torchvision"] = None  # as where it is not installed
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
except OSError as error:
    assert "unreachable" in str(error), error
else:
    sys.exit("there is a network")
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_offline(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a namespace without a network, where torchvision cannot be imported."""
    program = ["unshare", "--map-root-user", "--net", sys.executable, "-c", WITHOUT_TORCHVISION]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*program, "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_data_tests_pass_without_a_network_and_without_torchvision() -> None:
    can = (
        shutil.which("unshare")
        and not subprocess.run(
            ["unshare", "--map-root-user", "--net", "true"], capture_output=True, check=False
        ).returncode
    )
    if not can:
        pytest.skip("this system gives no namespace without a network")
    # Its server is on this host, which has no address in such a namespace either.
    served = "tests/data/decoding/test_object_store.py"
    done = run_offline("tests/data", "-m", "not slow", "--ignore", served)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
