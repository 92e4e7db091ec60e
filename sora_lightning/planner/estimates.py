"""Time, memory, GPU-hours and price of training and sampling, from what was counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sora_lightning.checks import require_at_least, require_in
from sora_lightning.planner.counting import Count
from sora_lightning.planner.devices import Device

# Bytes a parameter in mixed precision: weights and gradients in bfloat16; weights and two moments
# of Adam in float32 (arXiv 1910.02054, section 3.1); a float32 average.
TRAINING_BYTES, EMA_BYTES, WEIGHT_BYTES = 2 + 2 + 12, 4, 2


@dataclass(frozen=True)
class Parallelism:
    """How many GPUs share the work. ``sharded`` is FSDP2, which divides all states among all GPUs;
    without it (DDP) only ``tensor`` parallelism divides them. ``context`` and ``tensor``
    parallelism, the latter with sequence parallelism, divide the activations of a clip.
    """

    gpus: int = 8
    sharded: bool = True
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        require_at_least(1, gpus=self.gpus, tensor=self.tensor, context=self.context)
        if self.gpus % (self.tensor * self.context):
            raise ValueError(
                f"gpus = {self.gpus} is not a multiple of tensor x context = "
                f"{self.tensor} x {self.context}"
            )

    @property
    def replicas(self) -> int:
        return self.gpus // (self.tensor * self.context)


@dataclass(frozen=True)
class Workload:
    """A training of ``batch`` clips on each replica for ``steps`` optimizer steps, and samples of
    ``sampling_steps`` steps with ``guidance_passes`` forward passes each.

    ``utilisation`` is the share of the peak that is reached; ``price`` is that of a GPU-hour.
    """

    batch: int = 1
    steps: int = 100_000
    sampling_steps: int = 50
    guidance_passes: int = 2
    utilisation: float = 0.4
    price: float = 2.0
    checkpointing: bool = True
    cached_latents: bool = True
    ema: bool = True

    def __post_init__(self) -> None:
        require_at_least(
            1,
            batch=self.batch,
            steps=self.steps,
            sampling_steps=self.sampling_steps,
            guidance_passes=self.guidance_passes,
        )
        require_in("(0, 1]", utilisation=self.utilisation)


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes on each GPU; times in hours of one GPU, but for ``steps_per_second``.

    ``largest_batch`` is that of a replica; ``longest_clip`` is in tokens, for one clip on a
    replica; both are 0 where the states alone do not fit. ``fewest_gpus`` share all states and one
    clip; ``fewest_sampling_gpus`` share the weights and the working set of one forward pass.
    """

    step_flops: float
    training_flops: float
    state_memory: float
    activation_memory: float
    fits: bool
    steps_per_second: float
    training_hours: float
    training_price: float
    sample_flops: float
    sample_hours: float
    sample_price: float
    sampling_memory: float
    largest_batch: int
    longest_clip: int
    fewest_gpus: int
    fewest_sampling_gpus: int


def estimate(cost: Count, device: Device, parallelism: Parallelism, work: Workload) -> Estimate:
    """Return the estimate for one size. Communication costs no time but what ``utilisation``
    allows for, and no memory.

    Activations grow in proportion to tokens and clips: fused attention keeps no matrix of scores.
    Work that checkpointing repeats counts in ``step_flops``.
    """
    states = state_bytes(cost, work.ema) / _shards(parallelism)
    shared = parallelism.tensor * parallelism.context
    clip = (cost.checkpointed if work.checkpointing else cost.activations) / shared
    step = training_flops_of_clip(cost, work) * work.batch * parallelism.replicas
    rate = device.bf16_flops * work.utilisation
    training_hours = step * work.steps / rate / 3600
    passes = work.sampling_steps * work.guidance_passes
    sample = passes * cost.forward_flops + cost.decode_flops
    left = max(0.0, device.memory - states)
    sampling_memory = WEIGHT_BYTES * cost.parameters + cost.working_set
    return Estimate(
        step_flops=step,
        training_flops=step * work.steps,
        state_memory=states,
        activation_memory=clip * work.batch,
        fits=states + clip * work.batch <= device.memory,
        steps_per_second=rate * parallelism.gpus / step,
        training_hours=training_hours,
        training_price=training_hours * work.price,
        sample_flops=sample,
        sample_hours=sample / rate / 3600,
        sample_price=sample / rate / 3600 * work.price,
        sampling_memory=sampling_memory,
        largest_batch=int(left // clip),
        longest_clip=int(left / clip * cost.tokens),
        fewest_gpus=math.ceil((state_bytes(cost, work.ema) + clip * shared) / device.memory),
        fewest_sampling_gpus=math.ceil(sampling_memory / device.memory),
    )


def state_bytes(cost: Count, ema: bool) -> float:
    """Return the bytes of weights, gradients, Adam's states and average of what trains of the
    denoiser, and of its frozen weights.
    """
    states = (TRAINING_BYTES + (EMA_BYTES if ema else 0)) * cost.trained
    return states + WEIGHT_BYTES * (cost.parameters - cost.trained)


def training_flops_of_clip(cost: Count, work: Workload) -> float:
    """Return the FLOPs of one clip in a training step."""
    flops = cost.forward_flops + cost.backward_flops
    flops += cost.forward_flops if work.checkpointing else 0.0
    return flops if work.cached_latents else flops + cost.encode_flops


def _shards(parallelism: Parallelism) -> int:
    return parallelism.gpus if parallelism.sharded else parallelism.tensor
