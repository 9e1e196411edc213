"""Image files that were made to harm whoever opens them, and what is left of good ones that were cut short."""

import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

_EXIF_LIMIT = 65_533
_MEBIBYTE = bytes(1 << 20)


def cut(seed: int) -> Iterator[bytes]:
    """Every beginning of a small picture in each of the six formats, shorter than the whole."""
    rng = random.Random(seed)
    picture = Image.frombytes("RGB", (6, 4), rng.randbytes(72))
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        whole = encoded(picture, kind)
        yield from (whole[:length] for length in range(len(whole)))


def damaged(seed: int) -> Iterator[bytes]:
    """Without end: a good picture with some of its bytes changed, doubled or taken out."""
    rng = random.Random(seed)
    kinds = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
    pictures = [encoded(Image.frombytes("RGB", (12, 9), rng.randbytes(324)), kind) for kind in kinds]
    while True:
        data = bytearray(rng.choice(pictures))
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(data))
            what = rng.randrange(3)
            if what == 0:
                data[place] = rng.randrange(256)
            elif what == 1:
                data[place:place] = data[place : place + rng.randint(1, 64)]
            else:
                del data[place : place + rng.randint(1, 16)]
            data = data or bytearray(b"\0")
        yield bytes(data)


def bombs() -> list[bytes]:
    """Small files that promise, or hold, a lot."""
    blown_up = zlib.compress(_MEBIBYTE * 63, 9)
    many_texts = [(b"zTXt", b"k\0\0" + zlib.compress(_MEBIBYTE[:-1], 9))] * 63
    red = Image.new("RGB", (8, 8), "red")
    return [
        *(png((65_535, 65_535), [(kind, blown_up)]) for kind in (b"IDAT", b"zTXt")),
        png((0, 0), []),
        png((2**31 - 1, 2**31 - 1), []),
        png((8, 8), [(b"iCCP", b"k\0\0" + blown_up)]),
        png((8, 8), [(b"zTXt", b"k\0\0" + blown_up)]),
        png((8, 8), [(b"iTXt", b"k\0\1\0\0\0" + blown_up)]),
        png((8, 8), [(b"tEXt", b"k\0" + _MEBIBYTE)] * 8),
        png((8, 8), many_texts),
        png((8, 8), [(b"IDAT", blown_up)]),
        png((8, 8), [(b"abCd", b"")] * 20_000),
        png((8, 8), [(b"acTL", struct.pack(">II", 2**31 - 1, 0))]),
        encoded(
            red, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, n % 256)) for n in range(300)]
        ),
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
        b"GIF89a\x08\0\x08\0\x80\0\0" + bytes(6) + b"!\xfe" + b"\x01a" * 100_000,
        encoded(red, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, n, 0)) for n in range(50)]),
        webp_canvas(16_383, 16_383),
        *tiffs(),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n",
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "b">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>',
        encoded(red, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes(_EXIF_LIMIT - 20)),
        encoded(red, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\1\3\0\xff\xff\xff\xff\x06\0\0\0" * 5000),
        b"\xff\xd8" + b"\xff\xfe\0\x02" * 50_000,
        b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\1\x22\0\2\x11\1\3\x11\1",
        encoded(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)[:-300],
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        b"\0\0\1\0\xff\xff" + b"\0" * 4096,
        b"icns" + struct.pack(">I", 64) + (b"ic10" + struct.pack(">I", 0)) * 4,
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 56, 30_000, 30_000, 8, 3) + b"\xff" * 64,
        b"P6 99999 99999 255\n",
        b"P5\n#" + b"c" * 100_000,
        b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\0jp2h" * 100,
        b"\0\0\0\x1cftypavif" + bytes(512),
    ]


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(size: tuple[int, int], chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Of a size, with these chunks after the header and nothing else."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in [(b"IHDR", header), *chunks])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def webp_canvas(width: int, height: int) -> bytes:
    """An animation whose canvas alone is a gigabyte."""
    frame = encoded(Image.new("RGB", (8, 8), "red"), "WEBP", lossless=True)[12:]
    canvas = b"\2\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    first = bytes(6) + (7).to_bytes(3, "little") * 2 + bytes(4) + frame
    body += b"ANMF" + struct.pack("<I", len(first)) + first
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def tiffs() -> list[bytes]:
    """Tags without end, that point into themselves, or that say more than there is."""
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1), (278, 4, 1, 8)]
    return [
        _tiff([*tags, (273, 4, 1, 8), (279, 4, 1, 2**32 - 1)]),
        _tiff([*tags, (273, 4, 2**31, 8), (279, 4, 2**31, 8)]),
        _tiff([(256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1), *tags[2:], (273, 4, 1, 8)]),
        _tiff([*tags[:2], (258, 3, 65_535, 8), *tags[3:]]),
        _tiff([*tags, (259, 3, 1, 5), (273, 4, 1, 8), (279, 4, 1, 64)]),
        _tiff([*tags, (259, 3, 1, 7), (273, 4, 1, 8), (279, 4, 1, 64)]),
        _tiff([(number, 3, 1, 5) for number in range(20_000)]),
        b"II*\0" + struct.pack("<I", 2**32 - 1),
        b"MM\0+\0\x08\0\0" + b"\xff" * 64,
    ]


def _tiff(tags: list[tuple[int, int, int, int]]) -> bytes:
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + b"\0" * 4
    )
