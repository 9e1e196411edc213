"""The worker program that decodes the images of requests for `decoder_pool`, with limits on its time and memory.

The first line of its input is the maximum number of pixels of any image, and the reply to it is an empty line. A
request is two lines, the spec of the model and a `DecodeRequest`, followed by the image file. The reply is a
`DecodeReply` on one line, followed by the pixels. The system kills the process when an image takes too much time.
"""

import signal
import sys
from typing import Any, Final

import msgspec

from cifarx_serve.errors import ImageError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.images.preprocess import model_pixels
from cifarx_serve.images.reader import open_image, read_image, suppress_pillow_warnings
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.worker_process import init_worker

BASE_CPU_S: Final = 1.0
CPU_S_PER_PIXEL: Final = 3e-7
"""The CPU time that an image may take: several times what the slowest decoders need for real images."""

_BASE_BYTES: Final = 1 << 30
_BYTES_PER_PIXEL: Final = 40
"""The memory that the process may use: decoders, conversions and blending each hold the image in four bytes a pixel."""


class DecodeRequest(msgspec.Struct, frozen=True):
    """Request to decode the `size` bytes that follow it."""

    size: int
    max_pixels: int


class DecodeReply(msgspec.Struct, frozen=True):
    """The shape of the pixels that follow it, uint8 (height, width, channels); or the two parts of an `ImageError`."""

    shape: tuple[int, int, int] = (0, 0, 0)
    error: tuple[str, str] | None = None
    too_many_pixels: bool = False


def cpu_limit_s(pixels: int) -> float:
    """Return the CPU time in seconds that an image may take."""
    return BASE_CPU_S + CPU_S_PER_PIXEL * pixels


def main() -> None:
    """Answer requests until standard input is closed."""
    replies, requests = init_worker(), sys.stdin.buffer
    _limit_memory(int(requests.readline() or 0))
    replies.write(b"\n")
    replies.flush()
    spec_line, spec = b"", None
    with suppress_pillow_warnings:
        while line := requests.readline():
            if line != spec_line:
                spec_line, spec = line, msgspec.json.decode(line, type=ModelSpec)
            assert spec is not None
            request = msgspec.json.decode(requests.readline(), type=DecodeRequest)
            reply, pixels = _decode(requests.read(request.size), request.max_pixels, spec)
            replies.write(msgspec.json.encode(reply) + b"\n")
            replies.write(pixels)
            replies.flush()


def _decode(data: bytes, max_pixels: int, spec: ModelSpec) -> tuple[DecodeReply, Any]:
    try:
        _limit_cpu(cpu_limit_s(0))
        image = open_image(data, max_pixels)
        _limit_cpu(cpu_limit_s(image.width * image.height))
        pixels = model_pixels(read_image(image), spec, max_pixels)
    except ImageError as error:
        return DecodeReply(error=(error.problem, error.remedy), too_many_pixels=isinstance(error, TooManyPixels)), b""
    finally:
        _limit_cpu(0)
    height, width, channels = pixels.shape
    return DecodeReply((height, width, channels)), pixels.tobytes()


def _limit_cpu(seconds: float) -> None:
    """Let the system kill this process after so much more CPU time; 0 for no limit. No code of Python is needed."""
    if hasattr(signal, "ITIMER_PROF"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory(max_pixels: int) -> None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return
    limit = _BASE_BYTES + _BYTES_PER_PIXEL * max_pixels
    _, maximum = resource.getrlimit(resource.RLIMIT_AS)
    if maximum == resource.RLIM_INFINITY or limit < maximum:
        resource.setrlimit(resource.RLIMIT_AS, (limit, maximum))


if __name__ == "__main__":
    main()
