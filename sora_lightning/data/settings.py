"""The settings of ``VideoDataModule``, in groups as a YAML has them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sora_lightning.checks import require_at_least, require_in, require_positive
from sora_lightning.data.batching.buckets import Buckets, SizeFamily, SizeRule
from sora_lightning.data.batching.native_sizes import NativeSizes, Packing
from sora_lightning.data.decoding.readers import Reader
from sora_lightning.types import VideoSize


@dataclass(frozen=True)
class Reading:
    """Settings of reading files, and of those that cannot be read.

    Args:
        num_workers: Processes that decode; 0 decodes in the training process. The command line
            leaves each of them a core, unless OMP_NUM_THREADS sets the threads of torch. Batches
            are the same for any number, weights to the last bit for the same threads.
        root: A folder or address, besides each manifest's own folder, under which files may lie
            that a manifest names; others are refused.
        reader: Decodes the files. By default decord, with PyAV for files that decord misreads.
        decode_timeout_s: Seconds that one clip may take to fetch, and to decode; then it counts as
            bad. Decoding runs in a child of each worker, which is then stopped. Null decodes
            without one and sets no limit; systems that cannot fork limit only fetching.
        max_bad_share: The run stops when more than this share of a manifest's clips cannot be read.
        sources: Serve with each clip the one that the manifest's ``source`` names, for systems that
            learn instructions; ``predict`` then encodes those too.
        verify_content: Hash every file whole before its first frame is served, once in each worker,
            and leave out those that changed since they were indexed, including damaged ones of the
            same size and time. Every row needs the ``content`` that ``index`` writes. By default a
            file is hashed only if its size or time differs from the recorded one.
    """

    num_workers: int = 0
    root: str | None = None
    reader: Reader | None = None
    decode_timeout_s: float | None = 30.0
    max_bad_share: float = 0.05
    sources: bool = False
    verify_content: bool = False

    def __post_init__(self) -> None:
        require_at_least(0, num_workers=self.num_workers)
        require_positive(decode_timeout_s=self.decode_timeout_s)
        require_in("[0, 1]", max_bad_share=self.max_bad_share)
        if self.verify_content and self.sources:
            raise ValueError(
                "verify_content and sources are both given: a row records what its clip holds, and "
                "not what its source does"
            )


@dataclass(frozen=True)
class Batching:
    """Settings of sizes, batches and their order.

    Args:
        sizes: ``frames x rows x columns``, say ``["17x32x32", "17x24x40"]``, or a ``SizeFamily``
            that makes such a list. A clip goes to the one that keeps most of it; it is scaled down
            and cut, never scaled up or distorted.
        pixels_per_batch: A batch holds one size and as many clips as this number of frames x rows x
            columns allows.
        predict_sizes: The sizes that ``predict`` encodes, by default ``sizes``. A tokenizer that
            trains on other lengths measures the statistics of its latents at these.
        windows_per_clip: Number of evenly placed windows of each clip that ``predict`` encodes and
            that a cache is read for. Training on pixels draws from all windows.
        fixed_windows: Training on pixels draws from these windows only, like a training from the
            cache.
        run_length: How many batches of one size, or packs of like cost, come in a row. Numbers of
            ranks that divide it see the same order; by default it is 8, and for a number of ranks
            that does not divide 8 their least common multiple.
        steps_per_epoch: Batches on each rank that Lightning counts as an epoch; by default every
            clip once. The order does not depend on it.
        seed: Draws the order, the windows and the captions.
    """

    sizes: list[str] | SizeFamily | None = None
    pixels_per_batch: int | None = None
    predict_sizes: list[str] | SizeFamily | None = None
    windows_per_clip: int = 1
    fixed_windows: bool = False
    run_length: int | None = None
    steps_per_epoch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(
            1,
            windows_per_clip=self.windows_per_clip,
            run_length=self.run_length,
            steps_per_epoch=self.steps_per_epoch,
        )
        require_at_least(0, seed=self.seed)

    def size_rule(self, fps: float, packing: Packing | None) -> SizeRule:
        """Return the rule of sizes. Raises ``ValueError`` unless there is exactly one."""
        names = ("sizes", "pixels_per_batch", "predict_sizes")
        if packing is not None:
            if wrong := [name for name in names if getattr(self, name) is not None]:
                raise ValueError(
                    f"{wrong[0]} and packing are both given: packing has sizes of its own"
                )
            return NativeSizes(packing, fps)
        for name in names[:2]:
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing: batches need it where there is no packing")
        assert self.sizes is not None
        assert self.pixels_per_batch is not None
        if isinstance(self.sizes, SizeFamily):
            return Buckets(self.sizes.sizes(), fps, self.pixels_per_batch)
        return Buckets([VideoSize.parse(size) for size in self.sizes], fps, self.pixels_per_batch)

    def predict_rule(self, rule: SizeRule) -> SizeRule:
        """Return the rule of the sizes that ``predict`` encodes; ``rule`` is that of training."""
        if self.predict_sizes is None:
            return rule
        return replace(self, sizes=self.predict_sizes).size_rule(rule.fps, None)
