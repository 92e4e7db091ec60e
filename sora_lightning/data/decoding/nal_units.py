"""Holes in H.264 and HEVC: zeros where data was lost, as an unfinished download leaves them."""

from __future__ import annotations

from collections.abc import Iterator

from av import CodecContext, Packet


def has_hole(packet: Packet, codec: CodecContext) -> bool:
    """Return True if zeros stand within a unit of the packet, where no encoder writes three in a
    row (ITU-T H.264, section 7.4.1; H.265, section 7.4.2). Decoders read on and often notice
    nothing.

    Zeros at the end of a unit may be padding. False for other codecs.
    """
    if codec.name not in ("h264", "hevc"):
        return False
    data = bytes(packet)
    return any(_is_zeroed(data, *bounds) for bounds in _units(data, codec))


def _units(data: bytes, codec: CodecContext) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of each unit; those that start codes divide are one."""
    header, place = codec.extradata or b"", 4 if codec.name == "h264" else 21
    if header[:1] != b"\1" or len(header) <= place:  # no avcC or hvcC: start codes
        yield 0, len(data)
        return
    width, begin = (header[place] & 3) + 1, 0
    while begin + width < len(data):
        begin += width
        end = begin + int.from_bytes(data[begin - width : begin])
        yield begin, min(end, len(data))
        begin = end


def _is_zeroed(data: bytes, begin: int, end: int) -> bool:
    while (first := data.find(b"\0\0\0", begin, end)) >= 0:
        begin = first
        while begin < end and not data[begin]:
            begin += 1
        if begin < end and data[begin] != 1:  # which would begin the next unit
            return True
    return False
