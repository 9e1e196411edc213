"""Create ONNX Runtime sessions, with the settings that they share on all devices."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.system.cpus import available_cpus, has_cpu_limit

if TYPE_CHECKING:
    import onnxruntime

CPU: Final[list[tuple[str, dict[str, str]]]] = [("CPUExecutionProvider", {})]
"""The execution providers for the CPU, with their options."""

# When a session is created, constant nodes are replaced by their outputs. A few bytes of shape can declare any size.
_MAX_FOLDED_SIZE: Final = "optimization.constant_folding_max_output_size_in_bytes"

# By default, idle threads spin on CPUs that other processes could use.
_ALLOW_SPINNING: Final = "session.intra_op.allow_spinning"

# Errors are raised as exceptions with a message of one line, so the library's log would only repeat them.
_LOG_FATAL: Final = 4


def create_session(
    model: Path | bytes,
    providers: list[tuple[str, dict[str, str]]],
    config: dict[str, str] | None = None,
    threads: int | None = None,
) -> "onnxruntime.InferenceSession":
    """Return a session for a file or for the bytes of a model.

    Args:
        model: the file, or its content.
        providers: the execution providers in the order of preference, with their options.
        config: entries of the session's configuration.
        threads: the number of threads for the CPU; by default one per CPU that this process may use.

    Raises:
        ModelFileError: the library cannot create a session.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(_LOG_FATAL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    if (cpus := threads or available_cpus()) != os.cpu_count():
        options.intra_op_num_threads = cpus  # an explicit count disables the pinning of threads to cores
    spinning = {_ALLOW_SPINNING: "0"} if has_cpu_limit() else {}
    for key, value in {_MAX_FOLDED_SIZE: str(_max_folded_size(model)), **spinning, **(config or {})}.items():
        options.add_session_config_entry(key, value)
    try:
        # With enable_fallback=1, the library would print to standard output and continue on the CPU.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # the library's exceptions have no common base class
        path = model if isinstance(model, Path) else "the test model"
        raise ModelFileError(f"{path} is not a valid ONNX model ({error_message(error)})", "export it again") from error


def release_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version such as "1.31.1" or "1.32.0.dev3", for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _max_folded_size(model: Path | bytes) -> int:
    """Return the maximum bytes of a folded constant: all weights of the file from 8 to 32 bits, and some more."""
    return (1 << 20) + 4 * (model.stat().st_size if isinstance(model, Path) else len(model))
