"""``python -m tests.bench.gpu``: what one GPU does in bfloat16, beside its own matrix product.

It needs torch, Lightning, einops and jaxtyping alone, and ends in nine minutes: cases that do not
fit in the time or the memory are written as not measured, as all are without a GPU. ``--tiny`` runs
every case at a small size, on a CPU too, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sora_lightning.denoisers import DiT
from sora_lightning.layers.partitions import FactorisedSelfAttention, Joint
from sora_lightning.live_memory import LiveMemory, fused_attention, without_gradients
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import Condition, PackedLatents
from tests.bench.models import CHANNELS, backward, condition, forward_gmac

RESULTS = Path("experiments/results/bench/gpu")
LAYOUTS = {"joint": Joint(), "factorised": FactorisedSelfAttention()}
TEXT, SIDE = 128, 32  # width of the text; of a frame of latents, 256 tokens
# Open-Sora's factorised over joint attention at these tokens, from its report.
OPEN_SORA = {4096: 0.97, 16384: 1.71, 65536: 5.0}
LIMIT_S = 520.0


@dataclass(frozen=True)
class Scale:
    """How large the cases are."""

    sizes: Sequence[str] = ("XL", "B")
    frames: Sequence[int] = (1, 16, 64, 256)
    compiled: Sequence[int] = (16, 64)
    video: Sequence[int] = (65, 256, 256)
    sampling_steps: int = 25
    product_side: int = 8192
    seconds: float = 1.5


TINY = Scale(("tiny",), (1, 2), (1,), (5, 32, 32), 2, 128, 0.0)


@dataclass(frozen=True)
class Measured:
    """A case. ``seconds`` is the median of its rounds, ``share`` its rate of multiply-accumulates
    over that of the matrix product; ``None`` is not measured. ``peak_gib`` is the most memory of
    tensors, and ``of_estimate`` that over the memory counted on the meta device.
    """

    case: str
    seconds: float | None = None
    share: float | None = None
    per_s: float | None = None
    unit: str = ""
    peak_gib: float | None = None
    of_estimate: float | None = None
    why_not: str = "not measured"


@dataclass(frozen=True)
class Case:
    """A case that is built when its turn comes. ``gmac`` and ``items`` are of one call."""

    name: str
    make: Callable[[], Callable[[], object]]
    gmac: Callable[[], float] | None = None
    items: float | None = None
    unit: str = ""
    estimate: Callable[[], float] | None = None


def cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Yield all cases, those that matter most first."""
    for size in scale.sizes:
        for frames in scale.frames:
            for layout in LAYOUTS:
                yield _passes(size, layout, frames, device, compiled=False, packed=False)
        for frames in scale.frames[:-1]:
            for layout in LAYOUTS:
                yield _passes(size, layout, frames, device, compiled=False, packed=True)
        yield _checkpointed(size, scale.frames[len(scale.frames) // 2], device)
        yield _sampling(size, scale, device)
    yield from _tokenizer(scale, device)
    for size in scale.sizes:  # last, since they compile for long
        for frames in scale.compiled:
            for layout in LAYOUTS:
                yield _passes(size, layout, frames, device, compiled=True, packed=False)


def _network(
    size: str, layout: str, device: torch.device, checkpointing: bool = False
) -> nn.Module:
    make = partial(DiT, CHANNELS, TEXT, size, layout=LAYOUTS[layout])
    return make(activation_checkpointing=checkpointing).to(device, torch.bfloat16)


def _inputs(frames: int, device: torch.device, batch: int = 1) -> tuple[Tensor, Tensor, Condition]:
    x_t = torch.randn(batch, CHANNELS, frames, SIDE, SIDE, device=device, dtype=torch.bfloat16)
    cond = condition(batch, TEXT)
    tokens, mask, pooled = cond.tokens, cond.mask, cond.pooled
    half = partial(Tensor.to, device=device, dtype=torch.bfloat16)
    return (
        x_t,
        torch.rand(batch, device=device),
        Condition(half(tokens), mask.to(device), half(pooled)),
    )


def _passes(
    size: str, layout: str, frames: int, device: torch.device, compiled: bool, packed: bool
) -> Case:
    """Forward and backward passes of one clip; packed, of it and two of half its frames."""
    extents = [frames] if not packed else [frames, max(1, frames // 2), max(1, frames // 2)]
    plain = partial(DiT, CHANNELS, TEXT, size, layout=LAYOUTS[layout])
    tokens = sum(extents) * SIDE**2 // 4

    def make() -> Callable[[], object]:
        model = _network(size, layout, device)
        for block in model.blocks if compiled else ():  # type: ignore[union-attr]
            block.compile()
        x_t, t, cond = _inputs(frames, device, len(extents))
        if not packed:
            return backward(model, partial(model, x_t, t, cond))
        clips = PackedLatents(tuple(x[:, :n] for x, n in zip(x_t, extents, strict=True)))

        def call() -> Tensor:
            return torch.stack([clip.sum() for clip in model(clips, t, cond).clips])

        return backward(model, call)

    kind = ("packed, " if packed else "") + ("compiled, " if compiled else "")
    return Case(
        f"DiT-{size}/2, {layout}, {tokens} tokens, {kind}forward and backward",
        make,
        lambda: 3 * sum(forward_gmac(plain, (n, SIDE, SIDE), TEXT) for n in extents),
        tokens,
        "tokens",
    )


def _checkpointed(size: str, frames: int, device: torch.device) -> Case:
    """Forward and backward passes with activation checkpointing, and their memory."""

    def make() -> Callable[[], object]:
        model = _network(size, "joint", device, checkpointing=True)
        return backward(model, partial(model, *_inputs(frames, device)))

    def estimate() -> float:
        model = _network(size, "joint", torch.device("meta"), checkpointing=True)
        inputs = _inputs(frames, torch.device("meta"))
        with LiveMemory() as memory, fused_attention(), without_gradients(model):
            model(*inputs).sum().backward()
        # Weights and their gradients stay beside what the passes hold.
        return memory.peak + 2 * sum(p.nbytes for p in model.parameters())

    tokens = frames * SIDE**2 // 4
    name = f"DiT-{size}/2, joint, {tokens} tokens, activation checkpointing, forward and backward"
    return Case(name, make, None, tokens, "tokens", estimate)


def _sampling(size: str, scale: Scale, device: torch.device) -> Case:
    """The forward passes of sampling one clip with guidance."""
    frames = scale.frames[len(scale.frames) // 2 - 1]

    def make() -> Callable[[], object]:
        model = _network(size, "joint", device)
        call = torch.no_grad()(partial(model, *_inputs(frames, device, batch=2)))
        return lambda: [call() for _ in range(scale.sampling_steps)]

    tokens = frames * SIDE**2 // 4
    name = f"DiT-{size}/2, {tokens} tokens, sampling {scale.sampling_steps} steps with guidance"
    return Case(name, make, None, 1, "videos")


def _tokenizer(scale: Scale, device: torch.device) -> Iterator[Case]:
    frames, height, width = scale.video

    def make(what: str) -> Callable[[], object]:
        tokenizer = ConvTokenizer().to(device, torch.bfloat16)
        video = torch.zeros(1, 3, frames, height, width, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            inputs = video if what == "encode" else tokenizer.encode(video)
        return torch.no_grad()(partial(getattr(tokenizer, what), inputs))

    for what in ("encode", "decode"):
        name = f"tokenizer of 4 x 8 x 8, {frames}x{height}x{width}, {what}"
        yield Case(name, partial(make, what), None, frames, "frames")


def measure(case: Case, device: torch.device, seconds: float, product: float) -> Measured:
    """Run a case. ``product`` is the matrix product's GMAC/s. Memory that is too small is said."""
    try:
        call = case.make()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        median = _median_s(call, device, seconds)
    except torch.OutOfMemoryError:
        return Measured(case.name, why_not="out of memory")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Measured(
        case=case.name,
        seconds=median,
        share=None if case.gmac is None else case.gmac() / median / product,
        per_s=None if case.items is None else case.items / median,
        unit=case.unit,
        peak_gib=None if peak is None else peak / 2**30,
        of_estimate=peak / case.estimate() if peak and case.estimate else None,
        why_not="",
    )


def _median_s(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the median of at least three calls after two that compile and allocate."""
    times: list[float] = []
    for _ in range(2):
        call()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begun_s = _now(device)
        call()
        times.append(_now(device) - begun_s)
    return statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def product_gmac_per_s(device: torch.device, side: int, seconds: float) -> float:
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return side**3 / 1e9 / _median_s(lambda: a @ a, device, seconds)


def _table(name: str, rows: Sequence[Measured]) -> str:
    lines = [f"On {name}, bfloat16.", "", "| case | median | share of the matrix product | rate "
             "| peak memory | of the estimate |", "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for row in rows:
        if row.seconds is None:
            lines.append(f"| {row.case} | {row.why_not} | – | – | – | – |")
            continue
        share = "–" if row.share is None else f"{row.share:.1%}"
        rate = "–" if row.per_s is None else f"{row.per_s:,.1f} {row.unit}/s"
        peak = "–" if row.peak_gib is None else f"{row.peak_gib:.2f} GiB"
        estimate = "–" if row.of_estimate is None else f"{row.of_estimate:.0%}"
        median = f"{1e3 * row.seconds:,.2f} ms"
        lines.append(f"| {row.case} | {median} | {share} | {rate} | {peak} | {estimate} |")
    lines += ["", "Factorised over joint attention, forward and backward, tokens a second:", ""]
    lines += ["| network | tokens | here | Open-Sora |", "|---|--:|--:|--:|"]
    return "\n".join(lines + list(_factorised(rows))) + "\n"


def _factorised(rows: Sequence[Measured]) -> Iterator[str]:
    """Yield how much faster factorised attention is than joint, for each dense case."""
    seconds = {row.case: row.seconds for row in rows}
    for case, factorised_s in seconds.items():
        if ", factorised, " not in case or "packed" in case:
            continue
        network, _, rest = case.partition(", factorised, ")
        tokens = int(rest.split()[0])
        joint_s = seconds[case.replace("factorised", "joint")]
        here = f"{joint_s / factorised_s:.2f}x" if joint_s and factorised_s else "not measured"
        network += ", compiled" if "compiled" in rest else ""
        yield f"| {network} | {tokens} | {here} | {OPEN_SORA.get(tokens, '–')} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and table")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = TINY if arguments.tiny else Scale()
    measures = device.type == "cuda" or arguments.tiny
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    name = name if measures else "no GPU: none was at hand"
    end = time.perf_counter() + LIMIT_S
    product = product_gmac_per_s(device, scale.product_side, scale.seconds) if measures else 0.0
    rows = [Measured(case.name) for case in cases(scale, device)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for i, case in enumerate(cases(scale, device)):
        if measures and time.perf_counter() < end:
            rows[i] = measure(case, device, scale.seconds, product)
            torch.compiler.reset()
        elif measures:
            rows[i] = replace(rows[i], why_not="not measured: the time was over")
        held = {"device": name, "torch": torch.__version__, "product_gmac_per_s": product}
        held["rows"] = [asdict(row) for row in rows]  # type: ignore[assignment]
        (arguments.output / "gpu.json").write_text(json.dumps(held, indent=1) + "\n")
    (arguments.output / "table.md").write_text(_table(name, rows))
    print((arguments.output / "table.md").read_text())


if __name__ == "__main__":
    main()
