"""Tables of clips: their formats, columns, filters and splits."""

from sora_lightning.data.manifest.records import ClipRecord, Footage, read_manifest

__all__ = ["ClipRecord", "Footage", "read_manifest"]
