"""Reads still images: upright, eight bits a channel, on white where they are transparent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sora_lightning.data.decoding.errors import DecodeError, looks_like, require_decodable_size

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def is_image(path: Path) -> bool:
    """Return True if a file is a still image, by its suffix."""
    return path.suffix.lower() in IMAGES


def check_image(path: Path) -> None:
    """Read the header alone. Raises ``DecodeError`` for what ``read_image`` refuses by it."""
    _opened(path).close()


def read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Return RGB pixels, rotated by the file's EXIF orientation.

    Grey levels of 16 bits are scaled to 8, and transparent pixels are composited on white. Of a
    camera's file of several images (MPO) it is the first. Raises ``DecodeError`` for a damaged
    file, an animation, floating point levels, and an image of too many pixels.
    """
    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                return _grey(path, upright)
            if upright.has_transparency_data:
                return on_white(np.asarray(upright.convert("RGBA")))
            return np.asarray(upright.convert("RGB"))
        except (OSError, ValueError, SyntaxError, MemoryError) as error:
            raise DecodeError(f"{path}: {error or 'needs too much memory'}") from error


def on_white(image: UInt8[np.ndarray, "H W 4"]) -> UInt8[np.ndarray, "H W 3"]:
    """Composite RGBA pixels, whose colours are not premultiplied, on white."""
    opacity = image[..., 3:].astype(np.uint16)
    levels = image[..., :3] * opacity + 255 * (255 - opacity)
    return ((levels + 127) // 255).astype(np.uint8)


def _grey(path: Path, image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise DecodeError(f"{path}: grey levels beyond 16 bits")
    scaled = ((levels * 255 + 32767) // 65535).astype(np.uint8)
    scaled[levels == image.info.get("transparency", -1)] = 255  # a PNG's level that is not shown
    return np.repeat(scaled[..., None], 3, axis=2)


def _opened(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise DecodeError(f"{path}: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or "is not an image that can be decoded"
        raise DecodeError(f"{path}: {reason}{looks_like(path)}") from error
    try:
        require_decodable_size(path, image.height, image.width)
        if getattr(image, "is_animated", False) and image.format != "MPO":
            several = "several pages" if image.format == "TIFF" else f"an animated {image.format}"
            raise DecodeError(f"{path}: {several}: convert it to a video file")
        if image.mode == "F":
            raise DecodeError(f"{path}: floating point levels, whose range the file does not say")
    except DecodeError:
        image.close()
        raise
    return image
