"""The program that decodes image files for another process.

Its first request is the `InputSpec`, to which the reply is an empty list; every other is a list of paths. The reply
to those is a line with an entry an image, null or the two parts of an `ImageError`, and then the pixels of the good
ones, uint8 (N, height, width, 3).
"""

import os
import sys
from typing import TypeAlias

import msgspec

from cifarx_serve.errors import ImageError
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.worker_process import take_replies

Problems: TypeAlias = list[tuple[str, str] | None]


def main() -> None:
    """Answer requests until there are no more."""
    replies = take_replies()
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
