"""A long video passes through a tokenizer in the memory of a short one."""

import os
import subprocess
import sys

import pytest

# Peak memory can only be read of a whole process, so each length has one of its own.
_MEASURE = """
import resource, sys
import torch
from sora_lightning.tokenizers import ConvTokenizer

torch.set_num_threads(1)
num_frames, piece = int(sys.argv[1]), 48
tokenizer = ConvTokenizer(widths=(32, 32, 64, 64)).eval()

def pieces():
    yield torch.rand(1, 3, 1, 64, 64) * 2 - 1
    for start in range(1, num_frames, piece):
        yield torch.rand(1, 3, min(piece, num_frames - start), 64, 64) * 2 - 1

with torch.no_grad():
    decoded = sum(v.shape[2] for v in tokenizer.decode_pieces(tokenizer.encode_pieces(pieces())))
assert decoded == num_frames
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


# What the program frees goes back to the system at once: otherwise the allocator's own reserves,
# which differ from run to run by hundreds of megabytes, are what is measured.
_NO_RESERVES = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_memory(num_frames: int) -> int:
    """Peak resident kilobytes of encoding and decoding so many frames of 64 x 64."""
    command = [sys.executable, "-c", _MEASURE, str(num_frames)]
    environment = {**os.environ, **_NO_RESERVES}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.slow
def test_a_thousand_frames_need_the_memory_of_fifty() -> None:
    assert peak_memory(1001) < 1.05 * peak_memory(49)
