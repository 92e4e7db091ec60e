"""``torch.compile`` sees one graph: nothing in a dense forward pass goes back to Python."""

import subprocess
import sys

import pytest

# In a process of its own: the hook that checks shapes in the other tests breaks graphs itself.
_PROGRAM = """
import torch
from sora_lightning.denoisers import DiT
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.layers.partitions import JOINT, PER_FRAME, PER_POSITION, HeadSplit, Periodic
from sora_lightning.types import Condition

torch.manual_seed(0)
layout = Periodic([(JOINT, PER_FRAME, HeadSplit((PER_POSITION, PER_FRAME)))])
dit = DiT(4, 16, size=TransformerSize(1, 24, 2), layout=layout)
for parameter in dit.parameters():
    torch.nn.init.normal_(parameter, std=0.15)
mask = torch.ones(2, 3, dtype=torch.bool)
cond = Condition(torch.randn(2, 3, 16), mask, torch.randn(2, 16))
x, t = torch.randn(2, 4, 3, 4, 4), torch.rand(2)
compiled = torch.compile(dit, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x, t, cond), dit(x, t, cond))
compiled(x, t, cond).sum().backward()
assert all(parameter.grad is not None for parameter in dit.parameters())

times = t[:, None].repeat(1, 12)
few, more = times.clone(), times.clone()
few[:, :4], more[:, :4], more[0, :2] = 0, 0, 0.5  # 4 and 5 distinct times
expected = [dit(x, each, cond) for each in (few, more)]
for block in dit.blocks:
    block.compile(backend="eager", fullgraph=True)
for each, y in zip((few, more), expected):
    torch.testing.assert_close(dit(x, each, cond), y)
    dit(x, each, cond).sum().backward()
"""


@pytest.mark.slow
def test_a_denoiser_compiles_into_one_graph_and_its_blocks_with_times_of_tokens():
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
