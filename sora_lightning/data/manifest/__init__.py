"""Tables of clips: their formats, columns, filters and splits."""

from sora_lightning.data.manifest.prompts import read_prompts
from sora_lightning.data.manifest.records import ClipRecord, ManifestRow, read_manifest, read_table

__all__ = ["ClipRecord", "ManifestRow", "read_manifest", "read_prompts", "read_table"]
