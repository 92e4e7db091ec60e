"""Which columns of a manifest are captions, and how often each is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sora_lightning.checks import require_in

if TYPE_CHECKING:
    from sora_lightning.data.manifest.records import ClipRecord


@dataclass(frozen=True)
class Captions:
    """The columns that captions are read from: of people and of a captioner (DALL-E 3, section 3).

    Each repeat of a clip draws its caption by the seed of ``data.batching``, the clip and the
    number of the repeat. Validation takes a clip's first caption, of people where there is one.

    Args:
        column: Captions by people.
        synthetic: Captions by a captioner, if they take part.
        synthetic_share: How often the synthetic caption is served, from 0 to 1, of clips with both.
            A clip with one kind has that kind alone.
        required: Leave out clips without a caption. ``False`` serves them with an empty one, for
            systems that read no captions; ``predict`` does so in any case.
    """

    column: str = "caption"
    synthetic: str | None = None
    synthetic_share: float = 0.95
    required: bool = True

    def __post_init__(self) -> None:
        require_in("[0, 1]", synthetic_share=self.synthetic_share)
        if self.column == self.synthetic:
            raise ValueError(
                f"synthetic = {self.synthetic!r}: is the column of the captions by people as well"
            )

    def require(self, manifest: Path, records: Sequence[ClipRecord]) -> None:
        """Raise ``ValueError`` if a column is asked for that no row has."""
        for key, name in (("column", self.column), ("synthetic", self.synthetic)):
            if name is None or any(record.columns.get(name) is not None for record in records):
                continue
            known = ", ".join(sorted({column for record in records for column in record.columns}))
            raise ValueError(
                f"{manifest}: no row has the column that data.captions.{key} = {name!r} names; "
                f"there are {known}"
            )
