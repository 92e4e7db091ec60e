"""Clips of all ranks are each other's negatives: two processes (gloo) train as one does."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from sora_lightning.systems import CaptionerSystem
from tests.captioner.networks import clips, coca

pytestmark = pytest.mark.slow
CAPTIONS = ["a red circle moves left", "up", "a blue square", "a red circle", "up"]


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.system = CaptionerSystem(coca()).train()

    def forward(self, videos, captions):
        if not captions:
            return self.system.no_losses()
        batch = SimpleNamespace(pixels=videos, captions=captions)
        output, contrastive = self.system.losses(batch)
        return contrastive + 2 * output.losses


def gradients(model, videos, captions, num_clips):
    """``num_clips`` is the mean number on a rank."""
    (model(videos, captions).sum() / num_clips).backward()
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def worker(rank, address, parts, expected):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = DistributedDataParallel(Losses())
    for part in (parts[rank], parts[rank]):  # in the second step DDP has other buckets
        model.zero_grad()
        for name, gradient in gradients(model, *part, len(CAPTIONS) / 2).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.parametrize("num_first", [2, 5], ids=["uneven", "a rank without clips"])
def test_two_processes_give_the_gradients_of_one(tmp_path, num_first):
    videos = torch.stack(clips(*[(3, 16, 16)] * len(CAPTIONS)))
    expected = gradients(Losses(), videos, CAPTIONS, len(CAPTIONS))
    halves = [slice(0, num_first), slice(num_first, None)]
    parts = [(videos[half], CAPTIONS[half]) for half in halves]
    address = f"file://{tmp_path / 'rendezvous'}"
    multiprocessing.spawn(worker, (address, parts, expected), nprocs=2)
