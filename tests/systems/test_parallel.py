"""What cannot be shared out over ranks is refused; test_strategies.py has what can be."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from sora_lightning.data.ranks import require_even
from sora_lightning.denoisers import Denoiser, DiT, UViT
from sora_lightning.denoisers.blocks import AdaLNBlock
from sora_lightning.denoisers.dit import DiTParts
from sora_lightning.denoisers.pretrained import configured_denoiser
from sora_lightning.layers.partitions import FactorisedDotProduct
from sora_lightning.layers.positions.relative import RelativeSelfAttention
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import parallel
from sora_lightning.systems.parallel import (
    ShardedStrategy,
    shard_parameters,
    split_heads,
    split_tokens,
)

MESH: Any = SimpleNamespace(size=lambda: 2)
_RELATIVE = partial(AdaLNBlock, self_attention=RelativeSelfAttention)


@pytest.mark.parametrize(
    ("denoiser", "said"),
    [
        (UViT(4, 8, TransformerSize(1, 8, 2)), "a UViT has no blocks to share out"),
        (DiT(4, 8, TransformerSize(1, 24, 3)), "num_heads = 3 is not a multiple of it"),
        (
            DiT(4, 8, TransformerSize(1, 24, 2), layout=FactorisedDotProduct()),
            "the heads of a SelfAttention differ; give 1",
        ),
    ],
)
def test_layers_that_cannot_be_shared_out_are_refused(denoiser: Denoiser, said: str) -> None:
    with pytest.raises(ValueError, match=f"tensor_parallel_size = 2: {said}"):
        split_heads(denoiser, MESH)


@pytest.mark.parametrize(
    ("denoiser", "said"),
    [
        (UViT(4, 8, TransformerSize(1, 8, 2)), "a UViT does not divide its tokens over ranks"),
        (DiT(4, 8, TransformerSize(1, 24, 3)), "num_heads = 3 must be a multiple of 2"),
        (
            DiT(4, 8, TransformerSize(1, 24, 2), layout=FactorisedDotProduct()),
            "num_heads = 2 must be a multiple of 4, since 2 partitions share the heads",
        ),
        (
            DiT(4, 8, TransformerSize(1, 24, 2), parts=DiTParts(_RELATIVE)),
            "the heads of a RelativeSelfAttention differ; give 1",
        ),
    ],
)
def test_tokens_that_cannot_be_divided_are_refused(denoiser: Denoiser, said: str) -> None:
    with pytest.raises(ValueError, match=f"context_parallel_size = 2: {said}"):
        split_tokens(denoiser, MESH)


@pytest.mark.parametrize("key", ["tensor_parallel_size", "context_parallel_size"])
def test_a_group_of_no_ranks_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} = 0: must be at least 1"):
        ShardedStrategy(**{key: 0})


@pytest.mark.parametrize(
    ("strategy", "num_batches", "limit", "refused"),
    [
        (ShardedStrategy(), 5, 1.0, True),
        (ShardedStrategy(), 5, 3, True),
        (ShardedStrategy(), 5, 2, False),
        (ShardedStrategy(), 4, 1.0, False),
        (None, 5, 1.0, False),
    ],
)
def test_ranks_that_share_weights_validate_on_equally_many_batches(
    strategy: Any, num_batches: int, limit: float, refused: bool
) -> None:
    """A rank without a batch would leave the others waiting for its share of the weights."""
    places = {"rank": 0, "num_replicas": 2}
    trainer: Any = SimpleNamespace(
        distributed_sampler_kwargs=places, strategy=strategy, limit_val_batches=limit
    )
    if refused:
        with pytest.raises(ValueError, match=rf"limit_val_batches = {limit}: 5 .*: give 2, or"):
            require_even(trainer, num_batches)
    else:
        require_even(trainer, num_batches)


def test_each_block_of_a_public_network_is_gathered_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from tests.denoisers.pipelines import COG

    denoiser = configured_denoiser(COG | {"_class_name": "CogVideoXTransformer3DModel"})
    shared: list[Any] = []
    monkeypatch.setattr(parallel, "fully_shard", lambda module, **_: shared.append(module))
    shard_parameters([denoiser, None], MESH)
    assert shared == [*denoiser.network.transformer_blocks, denoiser]
