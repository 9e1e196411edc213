"""The worker program that decodes image files for `decode_pool`.

The first request is an `InputSpec`, and the reply to it is an empty list. Every other request is a list of paths. Its
reply is one line with an entry per image, which is null or the two parts of an `ImageError`, followed by the pixels of
the images that were decoded, uint8 (N, height, width, channels).
"""

import os
import sys
from typing import TypeAlias

import msgspec

from cifarx_serve.errors import ImageError
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.worker_process import init_worker

Problems: TypeAlias = list[tuple[str, str] | None]


def main() -> None:
    """Answer requests until standard input is closed."""
    replies = init_worker()
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=InputSpec)
    replies.write(b"[]\n")
    replies.flush()
    for line in sys.stdin.buffer:
        problems: Problems = []
        pixels: list[bytes] = []
        for path in msgspec.json.decode(line, type=list[bytes]):
            try:
                pixels.append(resize(read_image(os.fsdecode(path)), spec).tobytes())
                problems.append(None)
            except ImageError as error:
                problems.append((error.problem, error.remedy))
        replies.write(msgspec.json.encode(problems) + b"\n")
        replies.writelines(pixels)
        replies.flush()


if __name__ == "__main__":
    main()
