"""A tokenizer trains against a discriminator through the command line and in two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from sora_lightning.tokenizers import Adversarial, ConvTokenizer, PatchDiscriminator3d

ADVERSARIAL = {
    "class_path": "sora_lightning.tokenizers.Adversarial",
    "init_args": {
        "discriminator": {
            "class_path": "sora_lightning.tokenizers.PatchDiscriminator3d",
            "init_args": {"widths": [4, 8]},
        },
        "start_step": 3,
        "r1": 1.0,
    },
}


@pytest.fixture
def model(tokenizer_model):
    arguments = {**tokenizer_model["init_args"], "adversarial": ADVERSARIAL}
    return {"model": {**tokenizer_model, "init_args": arguments}}


def weights(path):
    content = torch.load(path, weights_only=True)
    return content["state_dict"], content["optimizer_states"][0]["state"]


def test_resumed_is_uninterrupted_with_the_discriminator_too(fit, model, tmp_path):
    steps = ("--trainer.max_steps", "6", "--checkpoint.keep_every_n_steps", "4")
    whole = fit(model, tmp_path / "whole", *steps, "--trainer.gradient_clip_val", "1.0")
    middle = whole.parent / "step-00000004.ckpt"
    resumed = fit(
        model,
        tmp_path / "parts",
        *steps,
        "--trainer.gradient_clip_val",
        "1.0",
        "--ckpt_path",
        str(middle),
    )
    (first, first_state), (second, second_state) = weights(whole), weights(resumed)
    names = [name for name in first if name.startswith("adversarial.discriminator.")]
    assert names
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for place, state in first_state.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second_state[place][key]))
    # It has not moved before its start, and has after it.
    before = weights(middle)[0]
    assert any(not torch.equal(before[name], first[name]) for name in names)


def test_the_discriminator_waits_for_its_start(fit, model, tmp_path):
    steps = ("--trainer.max_steps", "4", "--checkpoint.keep_every_n_steps", "1")
    last = fit(model, tmp_path / "run", *steps)
    first, third, fourth = (
        weights(last.parent / f"step-0000000{step}.ckpt")[0] for step in (1, 3, 4)
    )
    names = [name for name in first if name.startswith("adversarial.")]
    assert all(torch.equal(first[name], third[name]) for name in names)
    assert all(not torch.equal(third[n], fourth[n]) for n in names if n.endswith("weight"))


def test_it_trains_in_bf16_with_accumulation_and_clipping(fit, model, tmp_path):
    settings = {
        "--trainer.precision": "bf16-mixed",
        "--trainer.accumulate_grad_batches": "2",
        "--trainer.gradient_clip_val": "0.5",
        "--trainer.max_steps": "5",
    }
    path = fit(model, tmp_path / "run", *(text for pair in settings.items() for text in pair))
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())


def test_clipping_lets_neither_side_shrink_the_other():
    from sora_lightning.tokenizers.adversarial import clip_grad_norm_per_module

    small, large = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    small.grad, large.grad = torch.tensor([0.3, 0.4]), torch.tensor([300.0, 400.0])
    clip_grad_norm_per_module([[small], [large]], 1.0, None)
    torch.testing.assert_close(small.grad, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(large.grad, torch.tensor([0.6, 0.8]))


class _Both(torch.nn.Module):
    """A training step as one module for DistributedDataParallel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokenizer = ConvTokenizer(
            latent_channels=2,
            widths=(4, 8),
            down_time=(True,),
            down_space=(True,),
            blocks_per_level=1,
        )
        self.adversarial = Adversarial(PatchDiscriminator3d((4, 4)), start_step=1)

    def forward(self, video, step):
        reconstruction = self.tokenizer.decode_raw(self.tokenizer.posterior(video).mean)
        loss = (reconstruction - video).abs().mean()
        last = self.tokenizer.last_layer()
        more, _ = self.adversarial(loss, reconstruction, video, last, step, _mean)
        return loss + more


def _mean(tensor):
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor


def _gradients(both, video):
    """The sum over a step before the start and one after it."""
    for step in (0, 1):
        both(video, step).backward()
    return {name.removeprefix("module."): p.grad for name, p in both.named_parameters()}


def _worker(rank, address, video, expected):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    both = DistributedDataParallel(_Both())
    for name, gradient in _gradients(both, video[rank : rank + 1]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    video = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(_gradients(_Both(), video))
    address = f"file://{tmp_path / 'rendezvous'}"
    multiprocessing.spawn(_worker, (address, video, expected), nprocs=2)
