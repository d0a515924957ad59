"""How long a video file says it is: a file that ends before that was cut off, however well what is left decodes."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

# The boxes that stand at the top of an ISO media file (mp4, mov, 3gp); anything else there is trailing garbage.
_BOXES = b"ftyp moov mdat free skip wide pnot moof mfra meta uuid styp sidx ssix prft emsg pdin bloc udta".split()
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # Matroska and WebM: header, then one segment


def declared_size(path: Path) -> int | None:
    """Bytes the file needs by the lengths its container states; None for a format that states none (a transport
    stream, a live recording). Sources: ISO/IEC 14496-12 (boxes), RFC 8794 (EBML), Microsoft's RIFF."""
    with open(path, "rb") as file:
        head = file.read(8)
        if head[4:] in _BOXES:
            return _boxes(file)
        if head[:4] == b"RIFF":
            return _riff(file)
        if head[:4] == _EBML:
            return _matroska(file)
    return None


def _boxes(file: BinaryIO) -> int:
    total, end = file.seek(0, 2), 0
    while end < total:
        file.seek(end)
        head = file.read(16)
        if head[4:8] not in _BOXES:
            break
        size, least = int.from_bytes(head[:4], "big"), 8
        if size == 1:  # a 64-bit size follows
            size, least = int.from_bytes(head[8:16], "big"), 16
        if size == 0:  # up to the end of the file
            return total
        if size < least:
            break
        end += size
    return end


def _riff(file: BinaryIO) -> int | None:
    total, end = file.seek(0, 2), 0
    while end < total:  # a large AVI is a row of RIFF chunks
        file.seek(end)
        head = file.read(8)
        size = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or size in (0, 0xFFFFFFFF):  # never filled in
            break
        end += 8 + size + size % 2
    return end or None


def _matroska(file: BinaryIO) -> int | None:
    file.seek(4)
    header = _vint(file)
    if header is None or header > 1 << 20:
        return None
    file.seek(header, 1)
    if file.read(4) != _SEGMENT:
        return None
    size = _vint(file)
    return None if size is None else file.tell() + size


def _vint(file: BinaryIO) -> int | None:
    """An EBML length; None when it is unknown or broken."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] ^ (0x80 >> more)]) + file.read(more), "big")
    return None if value == (1 << 7 * (more + 1)) - 1 else value
