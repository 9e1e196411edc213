import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.server.inference import decoder_pool
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoder_pool import DecoderPool, SlowImage
from cifarx_serve.server.inference.errors import DeadlineExceeded, DecoderUnavailable, RequestCancelled
from tests.support.asgi_client import encode_image
from tests.support.child_processes import running_children
from tests.support.color_model import SPEC
from tests.support.hostile_images import decode_bombs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are suspended and killed by signals")

MAX_PIXELS = 2_000_000
GOOD = encode_image(Image.effect_mandelbrot((300, 200), (-2, -1.5, 1, 1.5), 100).convert("RGB"), "WEBP", lossless=True)


def run_with_pool(test: Callable[[DecoderPool], Awaitable[None]], processes: int = 1) -> None:
    """Run a test with a pool. No process is left at the end."""

    async def run() -> None:
        with closing(DecoderPool(processes, MAX_PIXELS)) as decoders:
            await test(decoders)
        assert children() == []

    asyncio.run(run())


def children() -> list[psutil.Process]:
    return running_children("decoder_process")


async def decode(decoders: DecoderPool, data: bytes = GOOD, timeout_s: float = 60.0) -> NDArray[np.uint8]:
    return await decoders.decode(data, SPEC, MAX_PIXELS, Deadline(time.perf_counter(), timeout_s), lambda: False)


async def suspend(decoders: DecoderPool) -> None:
    """Start a process and stop it, as if an image took forever."""
    await decode(decoders)
    for child in children():
        child.suspend()


def test_an_image_is_decoded_and_resized() -> None:
    async def test(decoders: DecoderPool) -> None:
        assert children() == []
        for _ in range(2):
            assert np.array_equal(await decode(decoders), resize(read_image(GOOD), SPEC.input))
        assert len(children()) == 1

    run_with_pool(test)


def test_errors_of_images_keep_their_type_and_the_process() -> None:
    async def test(decoders: DecoderPool) -> None:
        before = await decode(decoders)
        processes = children()
        with pytest.raises(ImageError, match="truncated or damaged"):
            await decode(decoders, GOOD[:500])
        with pytest.raises(TooManyPixels, match=r"TIFF tiles of 4096x4096 pixels, over the limit of 2,000,000 pixels"):
            await decode(decoders, decode_bombs()["TIFF tile"])
        with pytest.raises(ImageError, match="more than 100 JPEG scans"):
            await decode(decoders, decode_bombs()["progressive JPEG"])
        assert np.array_equal(await decode(decoders), before)
        assert children() == processes

    run_with_pool(test)


def test_a_process_is_killed_at_the_deadline_and_replaced() -> None:
    async def test(decoders: DecoderPool) -> None:
        await suspend(decoders)
        (suspended,) = children()
        started = time.perf_counter()
        with pytest.raises(DeadlineExceeded, match=r"no response within 0\.2 s"):
            await decode(decoders, timeout_s=0.2)
        assert time.perf_counter() - started < 10.0
        assert not suspended.is_running()
        assert (await decode(decoders)).shape == (4, 6, 3)
        assert len(children()) == 1

    run_with_pool(test)


def test_a_deadline_also_ends_the_start_of_a_process() -> None:
    async def test(decoders: DecoderPool) -> None:
        with pytest.raises(DeadlineExceeded):
            await decode(decoders, timeout_s=0.001)
        assert children() == []
        assert (await decode(decoders)).shape == (4, 6, 3)

    run_with_pool(test)


def test_an_image_that_takes_too_much_cpu_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The process has little more CPU time than it needs to start, and Pillow never returns."""
    program = tmp_path / "slow_decoder.py"
    program.write_text(
        "from cifarx_serve.server.inference import decoder_process\n"
        "def never(image):\n"
        "    while True: pass\n"
        "decoder_process.read_image = never\n"
        "decoder_process.BASE_CPU_S = 0.2\n"
        "decoder_process.main()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(decoder_pool, "_PROGRAM", "slow_decoder")

    async def test(decoders: DecoderPool) -> None:
        with pytest.raises(SlowImage, match=rf"^{len(GOOD)} bytes take too much time to decode: resize the image"):
            await decode(decoders)

    run_with_pool(test)


def test_requests_that_wait_are_not_given_to_a_process_once_they_have_ended() -> None:
    async def test(decoders: DecoderPool) -> None:
        await suspend(decoders)
        first = asyncio.ensure_future(decode(decoders, timeout_s=1.0))
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineExceeded):
            await decode(decoders, timeout_s=0.1)
        gone = decoders.decode(GOOD, SPEC, MAX_PIXELS, Deadline(time.perf_counter(), 60.0), lambda: True)
        with pytest.raises(RequestCancelled):
            await gone
        with pytest.raises(DeadlineExceeded):
            await first
        assert (await decode(decoders)).shape == (4, 6, 3)

    run_with_pool(test)


def test_as_many_images_are_decoded_at_once_as_there_are_processes() -> None:
    async def test(decoders: DecoderPool) -> None:
        results = await asyncio.gather(*[decode(decoders) for _ in range(6)])
        assert [pixels.shape for pixels in results] == [(4, 6, 3)] * 6
        assert len(children()) == 2

    run_with_pool(test, processes=2)


def test_a_process_that_dies_fails_only_its_image() -> None:
    async def test(decoders: DecoderPool) -> None:
        await suspend(decoders)
        (suspended,) = children()
        failing = asyncio.ensure_future(decode(decoders))
        await asyncio.sleep(0.1)
        os.kill(suspended.pid, signal.SIGSEGV)
        suspended.resume()
        with pytest.raises(ImageError, match="the process ended with status -11"):
            await failing
        assert (await decode(decoders)).shape == (4, 6, 3)

    run_with_pool(test)


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(decoders: DecoderPool) -> None:
        for program in ("absent_program", "cifarx_serve.server.inference.decoder_process"):
            monkeypatch.setattr(decoder_pool, "_PROGRAM", program)
            if program == "absent_program":
                with pytest.raises(DecoderUnavailable, match="cannot start a process to decode images: try again"):
                    await decode(decoders)
            else:
                assert (await decode(decoders)).shape == (4, 6, 3)

    run_with_pool(test)


def test_the_pool_is_stuck_while_images_wait_and_none_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_pool, "_STUCK_S", 0.3)

    async def test(decoders: DecoderPool) -> None:
        await suspend(decoders)
        assert not decoders.is_stuck
        running = asyncio.ensure_future(decode(decoders, timeout_s=2.0))
        await asyncio.sleep(0.5)
        assert not decoders.is_stuck  # nothing waits
        waiting = asyncio.ensure_future(decode(decoders))
        await asyncio.sleep(0.05)
        assert decoders.is_stuck
        with pytest.raises(DeadlineExceeded):
            await running
        await waiting
        assert not decoders.is_stuck

    run_with_pool(test)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
def test_the_memory_of_a_process_is_limited() -> None:
    async def test(decoders: DecoderPool) -> None:
        await decode(decoders)
        (child,) = children()
        assert child.rlimit(psutil.RLIMIT_AS)[0] == (1 << 30) + 40 * MAX_PIXELS

    run_with_pool(test)
