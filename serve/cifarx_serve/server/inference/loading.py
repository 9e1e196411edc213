"""Loads models within a time limit for each step: a valid file can take forever to open, or to run its first batch.

A thread that does so cannot be ended, but a process can. So a new version of a model that is served is first tried in
a process of its own.
"""

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import msgspec

from cifarx_serve.errors import CifarxError, ModelFileError, error_message
from cifarx_serve.server.inference.model import ServedModel
from cifarx_serve.server.inference.trial_process import PASSED, STARTED, STEP, Trial
from cifarx_serve.server.settings import Settings
from cifarx_serve.system.worker_process import worker_command, worker_environment

_PROGRAM: Final = "cifarx_serve.server.inference.trial_process"

_ENGINE_FACTOR: Final = 20
"""How much longer opening may take with TensorRT, which builds an engine."""

_POLL_S: Final = 0.5


async def try_model(name: str, settings: Settings) -> None:
    """Open and warm up a model in a process, which is killed if a step takes too long.

    Args:
        name: the name of the model.
        settings: its file, and everything else that loading it depends on.

    Raises:
        ModelFileError: the model cannot be opened or warmed up, or not in time.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *worker_command(_PROGRAM),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=worker_environment(settings.threads),
        )
    except OSError as error:
        problem = f"cannot start a process that tries {settings.files[name]} ({error_message(error)})"
        raise ModelFileError(problem, "end other processes") from error
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(Trial(name, settings)) + b"\n")
        await _follow(process.stdout, name, settings)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _follow(replies: asyncio.StreamReader, name: str, settings: Settings) -> None:
    """Read the replies of a trial to its end. Raises as `try_model` does."""
    steps = 0
    line = await replies.readline()
    while line in (STARTED, STEP):
        steps += line == STEP
        try:
            line = await asyncio.wait_for(replies.readline(), _step_limit_s(steps, settings))
        except TimeoutError as error:
            raise _too_slow(name, steps, settings) from error
    if not line:
        raise ModelFileError(f"{settings.files[name]} ended the process that tried it", "export it again")
    if line != PASSED:
        raise ModelFileError(*msgspec.json.decode(line, type=tuple[str, str]))


async def load_model(name: str, settings: Settings) -> ServedModel:
    """Open and warm up a model in a thread.

    Raises:
        ModelFileError: the model cannot be opened or warmed up, or not in time. In the latter case, the thread goes on.
        DeviceError: the device is not available.
    """
    steps = [time.monotonic()]  # when each step began
    executor = ThreadPoolExecutor(1, "load")  # ends with the loading: a library may keep memory for each thread
    loading = executor.submit(
        ServedModel,
        name,
        settings.files[name],
        settings.backend,
        settings.device,
        settings.limits.max_batch,
        lambda: steps.append(time.monotonic()),
        settings.public_key,
    )
    executor.shutdown(wait=False)
    waiting = asyncio.wrap_future(loading)
    while not (await asyncio.wait({waiting}, timeout=_POLL_S))[0]:
        if time.monotonic() - steps[-1] > _step_limit_s(len(steps) - 1, settings):
            loading.add_done_callback(_close)
            raise _too_slow(name, len(steps) - 1, settings)
    try:
        return waiting.result()
    except CifarxError:
        raise
    except Exception as error:  # the exceptions of other packages' backends have no common base class
        problem = f"{settings.files[name]} cannot be loaded ({error_message(error)})"
        raise ModelFileError(problem, "check the file and the free memory") from error


def _step_limit_s(finished_steps: int, settings: Settings) -> float:
    builds_engine = finished_steps == 0 and settings.device.startswith("tensorrt")
    return settings.limits.load_timeout_s * (_ENGINE_FACTOR if builds_engine else 1)


def _too_slow(name: str, finished_steps: int, settings: Settings) -> ModelFileError:
    limit_s = _step_limit_s(finished_steps, settings)
    what = "has not run a batch of its warm-up" if finished_steps else "was not opened"
    return ModelFileError(f"{settings.files[name]} {what} within {limit_s:g} s", "raise --load-timeout-s")


def _close(loading: "Future[ServedModel]") -> None:
    """Release a model that was loaded too late."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()
