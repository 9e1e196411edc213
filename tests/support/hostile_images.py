"""Malicious, truncated and corrupted image files."""

import random
import struct
import zlib
from collections.abc import Iterator
from functools import cache

from PIL import Image

from tests.support.asgi_client import encode_image

_EXIF_LIMIT = 65_533
_MEBIBYTE = bytes(1 << 20)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


def truncated(seed: int) -> Iterator[bytes]:
    """Yield a small image in each format, truncated to every possible length."""
    rng = random.Random(seed)
    image = Image.frombytes("RGB", (6, 4), rng.randbytes(72))
    for image_format in _FORMATS:
        data = encode_image(image, image_format)
        yield from (data[:length] for length in range(len(data)))


def corrupted(seed: int) -> Iterator[bytes]:
    """Yield valid images with some bytes changed, duplicated or removed, without end."""
    rng = random.Random(seed)
    images = [encode_image(Image.frombytes("RGB", (12, 9), rng.randbytes(324)), name) for name in _FORMATS]
    while True:
        data = bytearray(rng.choice(images))
        for _ in range(rng.randint(1, 8)):
            start = rng.randrange(len(data))
            change = rng.randrange(3)
            if change == 0:
                data[start] = rng.randrange(256)
            elif change == 1:
                data[start:start] = data[start : start + rng.randint(1, 64)]
            else:
                del data[start : start + rng.randint(1, 16)]
            data = data or bytearray(b"\0")
        yield bytes(data)


def bombs() -> list[bytes]:
    """Return small files that decompress to large data, declare huge images, or are slow to parse."""
    compressed = zlib.compress(_MEBIBYTE * 63, 9)
    many_texts = [(b"zTXt", b"k\0\0" + zlib.compress(_MEBIBYTE[:-1], 9))] * 63
    red = Image.new("RGB", (8, 8), "red")
    return [
        *(png((65_535, 65_535), [(name, compressed)]) for name in (b"IDAT", b"zTXt")),
        png((0, 0), []),
        png((2**31 - 1, 2**31 - 1), []),
        png((8, 8), [(b"iCCP", b"k\0\0" + compressed)]),
        png((8, 8), [(b"zTXt", b"k\0\0" + compressed)]),
        png((8, 8), [(b"iTXt", b"k\0\1\0\0\0" + compressed)]),
        png((8, 8), [(b"tEXt", b"k\0" + _MEBIBYTE)] * 8),
        png((8, 8), many_texts),
        png((8, 8), [(b"IDAT", compressed)]),
        png((8, 8), [(b"abCd", b"")] * 20_000),
        png((8, 8), [(b"acTL", struct.pack(">II", 2**31 - 1, 0))]),
        encode_image(
            red, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, n % 256)) for n in range(300)]
        ),
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
        b"GIF89a\x08\0\x08\0\x80\0\0" + bytes(6) + b"!\xfe" + b"\x01a" * 100_000,
        encode_image(
            red, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, n, 0)) for n in range(50)]
        ),
        webp_canvas(16_383, 16_383),
        *tiffs(),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n",
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "b">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>',
        encode_image(red, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes(_EXIF_LIMIT - 20)),
        encode_image(
            red, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\1\3\0\xff\xff\xff\xff\x06\0\0\0" * 5000
        ),
        b"\xff\xd8" + b"\xff\xfe\0\x02" * 50_000,
        b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\1\x22\0\2\x11\1\3\x11\1",
        encode_image(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)[:-300],
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        b"\0\0\1\0\xff\xff" + b"\0" * 4096,
        b"icns" + struct.pack(">I", 64) + (b"ic10" + struct.pack(">I", 0)) * 4,
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 56, 30_000, 30_000, 8, 3) + b"\xff" * 64,
        b"P6 99999 99999 255\n",
        b"P5\n#" + b"c" * 100_000,
        b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\0jp2h" * 100,
        b"\0\0\0\x1cftypavif" + bytes(512),
    ]


@cache
def decode_bombs() -> dict[str, bytes]:
    """Return files that declare at most 1,000,000 pixels, and take far more to decode or to parse, by what they are."""
    large, text = Image.new("1", (4000, 4000)), zlib.compress(_MEBIBYTE[:-1], 9)
    tile = zlib.compress(bytes(4096 * 4096), 9)
    return {
        "ICNS": _icns(encode_image(large, "PNG")),
        "ICO": _ico(encode_image(large, "PNG")),
        "JPEG 2000": encode_image(Image.new("L", (64, 64)), "JPEG2000"),
        "TIFF tile": _tiff([*_TIFF_TAGS, (259, 3, 1, 8), *_tile(4096, len(tile))], tile),
        "BigTIFF tile": _big_tiff([*_TIFF_TAGS, (259, 3, 1, 8), (322, 16, 1, 4096), (323, 16, 1, 4096)]),
        "TIFF tile twice": _tiff([*_TIFF_TAGS, (259, 3, 1, 8), *_tile(16, 8), (322, 4, 1, 4096), (323, 4, 1, 4096)]),
        "TIFF tags": _tiff([*_TIFF_TAGS, *((1000 + number, 3, 2, 8) for number in range(20_000))]),
        "TIFF tags of the same bytes": _tiff(
            [*_TIFF_TAGS, *((1000 + n, 7, 1 << 20, 8) for n in range(500))], _MEBIBYTE
        ),
        "TIFF EXIF directory": _tiff(
            [*_TIFF_TAGS, (34665, 4, 1, 286)], bytes(200) + struct.pack("<H", 60_000) + bytes(1 << 20)
        ),
        "TIFF offsets": _tiff([*_TIFF_TAGS, (273, 4, 1 << 19, 8), (279, 4, 1 << 19, 8)], _MEBIBYTE * 5),
        "progressive JPEG": jpeg_of_scans(3000),
        "sequential JPEG": _sequential_jpeg(2000),
        "JPEG comments": b"\xff\xd8" + b"\xff\xfe\0\x02" * 400_000,
        "PNG zTXt": png((8, 8), [*[(b"zTXt", b"k\0\0" + text)] * 60, _PIXELS]),
        "PNG iTXt": png((8, 8), [*[(b"iTXt", b"k\0\1\0\0\0" + text)] * 60, _PIXELS]),
        "PNG zTXt after the pixels": png((8, 8), [_PIXELS, *[(b"zTXt", b"k\0\0" + text)] * 60]),
        "PNG chunks": png((8, 8), [*[(b"abCd", b"")] * 80_000, _PIXELS]),
        "GIF comment": _GIF + b"!\xfe" + b"\x01a" * 900_000,
        "GIF extensions": _GIF + b"!\xfe\0" * 600_000,
        "GIF stray bytes": _GIF + b"\x01" * 1_800_000,
        "WebP canvas": webp_canvas(16_383, 16_383),
    }


def jpeg_of_scans(scans: int) -> bytes:
    """Return a progressive JPEG of 1000x1000 pixels, whose last scan is there this many times."""
    whole = encode_image(Image.new("L", (1000, 1000), 99), "JPEG", progressive=True)
    last, end = whole.rindex(b"\xff\xda"), len(whole) - 2
    return whole[:last] + whole[last:end] * scans + whole[end:]


def _sequential_jpeg(scans: int) -> bytes:
    """Return a black, baseline JPEG of 400x400 pixels, whose components are in scans of their own."""
    blocks = 50 * 50
    frame = struct.pack(">BHHB", 8, 400, 400, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    codes = bytes([1, *[0] * 15, 0])  # one code, "0": no difference, or the end of the block
    head = [(0xC0, frame), (0xDB, b"\0" + b"\1" * 64), (0xC4, b"\0" + codes), (0xC4, b"\x10" + codes)]
    scan = [_segment(0xDA, bytes([1, component, 0, 0, 63, 0])) + bytes(2 * blocks // 8) for component in (1, 2, 3)]
    return b"\xff\xd8" + b"".join(_segment(*each) for each in head) + scan[0] * scans + scan[1] + scan[2] + b"\xff\xd9"


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _icns(icon: bytes) -> bytes:
    return b"icns" + struct.pack(">I", 16 + len(icon)) + b"ic07" + struct.pack(">I", 8 + len(icon)) + icon


def _ico(icon: bytes) -> bytes:
    return struct.pack("<HHH4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(icon), 22) + icon


def png(size: tuple[int, int], chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG file with a header for `size`, followed by these chunks only."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in [(b"IHDR", header), *chunks])


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def webp_canvas(width: int, height: int) -> bytes:
    """Return an animation whose canvas takes a gigabyte."""
    frame = encode_image(Image.new("RGB", (8, 8), "red"), "WEBP", lossless=True)[12:]
    canvas = b"\2\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    first = bytes(6) + (7).to_bytes(3, "little") * 2 + bytes(4) + frame
    body += b"ANMF" + struct.pack("<I", len(first)) + first
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


# An 8x8 grayscale image in 8 bits, without the place of its pixels.
_TIFF_TAGS = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]


def tiffs() -> list[bytes]:
    """Return TIFF files with endless or circular tags, or with tags that promise more data than there is."""
    tags = [*_TIFF_TAGS, (278, 4, 1, 8)]
    return [
        _tiff([*tags, (273, 4, 1, 8), (279, 4, 1, 2**32 - 1)]),
        _tiff([*tags, (273, 4, 2**31, 8), (279, 4, 2**31, 8)]),
        _tiff([(256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1), *tags[2:], (273, 4, 1, 8)]),
        _tiff([*tags[:2], (258, 3, 65_535, 8), *tags[3:]]),
        _tiff([*tags, (259, 3, 1, 5), (273, 4, 1, 8), (279, 4, 1, 64)]),
        _tiff([*tags, (259, 3, 1, 7), (273, 4, 1, 8), (279, 4, 1, 64)]),
        _tiff([(tag, 3, 1, 5) for tag in range(20_000)]),
        b"II*\0" + struct.pack("<I", 2**32 - 1),
        b"MM\0+\0\x08\0\0" + b"\xff" * 64,
    ]


def _tile(side: int, size: int) -> list[tuple[int, int, int, int]]:
    """Return the tags of one tile, whose data follow the directory of `_TIFF_TAGS`, the compression and these tags."""
    offset = 8 + 2 + 12 * (len(_TIFF_TAGS) + 1 + 4) + 4
    return [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, offset), (325, 4, 1, size)]


def _tiff(tags: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def _big_tiff(tags: list[tuple[int, int, int, int]]) -> bytes:
    entries = b"".join(struct.pack(">HHQ", *tag[:3]) + _big_value(tag) for tag in tags)
    return b"MM\0+\0\x08\0\0" + struct.pack(">QQ", 16, len(tags)) + entries + bytes(8)


def _big_value(tag: tuple[int, int, int, int]) -> bytes:
    return struct.pack({3: ">H6x", 4: ">I4x", 16: ">Q"}[tag[1]], tag[3])


# The pixels of an 8x8 PNG file, and the start of a GIF file.
_PIXELS = (b"IDAT", zlib.compress(bytes(8 * 25)))
_GIF = b"GIF89a\x08\0\x08\0\x80\0\0" + bytes(6)
