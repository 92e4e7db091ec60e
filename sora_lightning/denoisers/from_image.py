"""An image DiT's weights as the start of a video DiT: what goes through time begins as identity."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from sora_lightning.denoisers.blocks import AdaLNBlock
from sora_lightning.denoisers.dit import DiT
from sora_lightning.denoisers.modulation import AdaLN
from sora_lightning.layers.inflation import central_frame, same_for_every_frame
from sora_lightning.layers.partitions import HeadSplit, Partition, TokenPartition
from sora_lightning.layers.positions.absolute import PositionEmbedding

State = dict[str, Tensor]


def start_from_image_dit(video: DiT, image: DiT) -> None:
    """Fill ``video`` so that it predicts for each frame of any clip what ``image`` does (for
    tubelets, and for joint attention: for each frame of a still clip).

    The image's blocks go in order to those blocks that attend within frames; attentions at a
    position through time, and blocks of nothing else, stand behind gates of zero. Tubelets take the
    image's first layer on their middle frame (ViViT, arXiv 2103.15691, equation 9) and its last
    layer for every frame. Learned positions that the image lacks begin at zero.

    Raises:
        ValueError: The networks differ in more than that, or positions without weights are added in
            time, which cannot begin at zero.
    """
    if image.patch.f != 1:
        raise ValueError(f"{image.patch}: an image model's patch has one frame")
    if image.time.scale != video.time.scale:
        raise ValueError(f"time_scale = {video.time.scale}, and {image.time.scale} of the image's")
    own, theirs = video.state_dict(), image.state_dict()
    state = _outside_blocks(video, image, own, theirs)
    sources = iter(image.blocks)
    for i, block in enumerate(video.blocks):
        if not isinstance(block, AdaLNBlock) or not isinstance(block.modulation, AdaLN):
            raise ValueError(f"block {i}: only gated blocks with a modulation each begin so")
        if True not in [_is_spatial(partition) for partition in _partitions(block)]:
            state |= _named(_identity(block), f"blocks.{i}.")
            continue
        source = next(sources, None)
        if source is None:
            raise ValueError(f"{len(image.blocks)} blocks of the image model are too few")
        assert isinstance(source, AdaLNBlock)
        state |= _named(_block(block, source, i), f"blocks.{i}.")
    if next(sources, None) is not None:
        raise ValueError(f"{len(image.blocks)} blocks of the image model are too many")
    for name in state:
        if state[name].shape != own[name].shape:
            raise ValueError(
                f"{name}: shape {tuple(state[name].shape)} of the image model does not fit "
                f"{tuple(own[name].shape)}"
            )
    video.load_state_dict(state)


def _named(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _partitions(block: AdaLNBlock) -> list[TokenPartition | HeadSplit]:
    return [attention.partition for attention in block.attentions]  # type: ignore[misc]


def _is_spatial(partition: TokenPartition | HeadSplit) -> bool:
    """Whether a token sees its whole frame; if not, it must see its own position alone."""
    if isinstance(partition, Partition):
        if partition.rows is None and partition.columns is None:
            return True
        if partition.rows == partition.columns == 1:
            return False
    raise ValueError(f"{partition} is neither of whole frames nor of one position through time")


def _outside_blocks(video: DiT, image: DiT, own: State, theirs: State) -> State:
    for position in video.positions:
        assert isinstance(position, PositionEmbedding)
        has_weights = any(True for _ in position.parameters())
        if not has_weights and type(position) not in map(type, image.positions):
            raise ValueError(
                f"positions: {type(position).__name__} has no weights to begin at zero; take "
                "Learned for time"
            )
    state = {name: tensor for name, tensor in theirs.items() if not name.startswith("blocks.")}
    frames = video.patch.f
    state["x_in.weight"] = central_frame(state["x_in.weight"], frames)
    for name in ("final.out.weight", "final.out.bias"):
        state[name] = same_for_every_frame(state[name], frames)
    for name in own.keys() - state.keys():
        if name.startswith("positions."):
            state[name] = own[name].new_zeros(own[name].shape)
    outside = {name for name in own if not name.startswith("blocks.")}
    if differing := outside ^ state.keys():
        raise ValueError(f"the networks differ in {', '.join(sorted(differing))}")
    return state


def _block(block: AdaLNBlock, source: AdaLNBlock, number: int) -> State:
    """The block's weights: the image's attention in the place of the one within frames, its own
    elsewhere, behind zero gates."""
    places = [i for i, one in enumerate(_partitions(block)) if _is_spatial(one)]
    if len(places) != 1 or len(source.attentions) != 1 or not (block.gated and source.gated):
        raise ValueError(f"block {number}: one attention within frames, and gates, are needed")
    (place,) = places
    state, theirs = block.state_dict(), source.state_dict()
    to = {"attentions.0.": f"attentions.{place}.", "norms.0.": f"norms.{place}."}
    to["norms.1."] = f"norms.{len(block.norms) - 1}."
    moved = {}
    for name, tensor in theirs.items():
        prefix = next((prefix for prefix in to if name.startswith(prefix)), "")
        moved[to.get(prefix, "") + name.removeprefix(prefix)] = tensor
    for name in ("weight", "bias"):
        moved[f"modulation.linear.{name}"] = _modulation(
            moved[f"modulation.linear.{name}"], len(block.norms), place
        )
    if strangers := moved.keys() - state.keys():
        raise ValueError(f"block {number} has no place for {', '.join(sorted(strangers))}")
    return state | moved


def _identity(block: AdaLNBlock) -> State:
    """The block's weights with all gates, and what stands behind no gate, at zero."""
    return {
        name: tensor.new_zeros(tensor.shape)
        if name.startswith(("modulation.", "text.out."))
        else tensor
        for name, tensor in block.state_dict().items()
    }


def _modulation(rows: Tensor, num_parts: int, place: int) -> Tensor:
    """The image's parts (attention, feed-forward) in their places, zero for all other parts."""
    attention, mlp = rearrange(rows, "(part rows) ... -> part rows ...", part=2)
    parts = attention.new_zeros(num_parts, *attention.shape)
    parts[place], parts[-1] = attention, mlp
    return rearrange(parts, "part rows ... -> (part rows) ...")
