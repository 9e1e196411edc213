"""The failures of PyTorch's converters as one line, which names the line of code that they cannot convert.

The converters raise exceptions of many kinds, with messages of many lines for the developers of PyTorch.
"""

import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from traceback import walk_tb
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

import cifarx_export
import cifarx_serve
import cifarx_train
from cifarx_serve.errors import CifarxError, UsageError, error_message

_ROOMS: Final = tuple(str(Path(room.__file__ or "").parent) for room in (cifarx_export, cifarx_serve, cifarx_train))
_TORCH: Final = str(Path(torch.__file__).parent)
_STANDARD_LIBRARY: Final = sysconfig.get_path("stdlib")
_PACKAGES: Final = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
_CONVERTERS: Final = tuple(str(Path(folder, name)) for folder in _PACKAGES for name in ("executorch", "torchao"))
"""Packages that convert networks, so their code is never that of a network."""

_DATA_DEPENDENT: Final = re.compile(
    r"data-dependent|\.numpy\(\) is not supported|\.tolist\(\) is not supported|Dynamic control flow is not supported"
)
_FIXED_BATCH: Final = re.compile(
    r"Constraints violated|conflicts between user-specified ranges|inconsistencies were found|specialized it to be"
)
_OTHER_BATCH_SIZE: Final = 3
"""A batch size to run a network with that its example does not have."""

_NO_ONNX_OPERATOR: Final = re.compile(r"No ONNX function found for <OpOverload\(op='(?:\w+\.)?(\w+)'")
_STACK_LINE: Final = re.compile(r'File "([^"]+)", line (\d+)')


@contextmanager
def reporting_conversion_errors(target: str, module: nn.Module, example: Tensor) -> Iterator[None]:
    """Report an exception of a converter as one line.

    Args:
        target: what the network is converted to, such as "ONNX".
        module: the network.
        example: the images that it is converted with.

    Raises:
        UsageError: a converter raised an exception within the block.
    """
    try:
        yield
    except (CifarxError, OSError, MemoryError):
        raise
    except Exception as error:  # the exceptions of the converters have no common base class
        raise _conversion_error(error, target, module, example) from error


@contextmanager
def reporting_run_errors(images: Tensor) -> Iterator[None]:
    """Report an exception of a network's own code as one line.

    Args:
        images: the images that the network runs on within the block.

    Raises:
        UsageError: the network raised an exception.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (CifarxError, OSError, MemoryError):
        raise
    except Exception as error:  # see reporting_conversion_errors
        place = code_line((frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__))
        shape = " x ".join(map(str, images.shape))
        raise UsageError(
            f"{_subject(place)} fails for images of shape {shape} ({type(error).__name__}: {error_message(error)})",
            "let the network take any number of images of its input size; CIFARX_DEBUG=1 shows the traceback",
        ) from error


def _conversion_error(error: Exception, target: str, module: nn.Module, example: Tensor) -> UsageError:
    chain = _causes(error)
    text = "\n".join(str(cause) for cause in chain)
    frames = [frame for cause in reversed(chain) for frame in walk_tb(cause.__traceback__)]
    place = code_line((frame.f_code.co_filename, line) for frame, line in frames)
    if missing := _NO_ONNX_OPERATOR.search(text):
        place = code_line(_stack_of_node(frames)) or place
        return UsageError(
            f"{_subject(place)} uses {missing[1].strip('_')}, for which {target} has no operator",
            "use another operation, or another --format",
        )
    if _DATA_DEPENDENT.search(text):
        return UsageError(
            f"{_subject(place)} depends on the values of the images, which {target} cannot represent",
            "compute with tensors instead of Python numbers and conditions, such as with torch.where",
        )
    if _FIXED_BATCH.search(text):
        place = _line_that_fixes_the_batch(module, example) or place
        return UsageError(
            f"{_subject(place)} works only for some batch sizes, and an exported network has to work for any",
            "use x.shape[0] or -1 for the size of the batch, and no condition or loop that depends on it",
        )
    reason = error_message(chain[-1])
    return UsageError(
        f"{_subject(place)} cannot be converted to {target} ({type(chain[-1]).__name__}: {reason})",
        "change that line, or choose another --format or --precision; CIFARX_DEBUG=1 shows the traceback",
    )


def code_line(places: Iterable[tuple[str, int]]) -> str | None:
    """Return the last place in the network's code, as `model.py line 12`.

    This is code of the user, or if there is none, code of a package other than PyTorch. None if there is neither.

    Args:
        places: the file and line of each frame of a stack, the innermost last.
    """
    outside = [(file, line) for file, line in places if not file.startswith(("<", _TORCH, *_CONVERTERS, *_ROOMS))]
    own = [(file, line) for file, line in outside if is_user_code(file)]
    packages = [(file, line) for file, line in outside if file.startswith(_PACKAGES)]
    for file, line in (*reversed(own), *reversed(packages)):
        return f"{Path(file).name} line {line}"
    return None


def is_user_code(file: str) -> bool:
    """Return whether a file of Python code belongs neither to Python, nor to an installed package, nor to cifarx."""
    return not file.startswith(("<", _STANDARD_LIBRARY, *_PACKAGES, *_ROOMS))


def stack_places(stack: str | None) -> list[tuple[str, int]]:
    """Return the file and line of each frame of a stack trace as text."""
    return [(match[1], int(match[2])) for match in _STACK_LINE.finditer(stack or "")]


def _subject(place: str | None) -> str:
    return place or "the network"


def _causes(error: BaseException) -> list[BaseException]:
    """Return an exception and the causes that it was raised from, the original one last."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _stack_of_node(frames: Iterable[tuple[Any, int]]) -> list[tuple[str, int]]:
    """Return the stack of the node that a converter worked on, whose code has finished running long before."""
    nodes = (frame.f_locals.get("node") for frame, _ in frames)
    stacks = [stack_places(node.meta.get("stack_trace")) for node in nodes if isinstance(node, torch.fx.Node)]
    return stacks[-1] if stacks else []


def _line_that_fixes_the_batch(module: nn.Module, example: Tensor) -> str | None:
    """Return the line of code that works only for some batch sizes, or None if it is not known.

    This is the line that fails for another batch size, or else the first one where the tracer of TorchScript warns that
    the code uses a size as a Python number. `torch.export` does not say where it found the condition.
    """
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(sys.stderr), torch.no_grad():
        warnings.simplefilter("always")
        try:
            module(example[:1].expand(_OTHER_BATCH_SIZE, *example.shape[1:]).contiguous())
            torch.jit.trace(module, example.clone(), check_trace=False)
        except Exception as error:  # the exceptions of a network have no common base class
            if place := code_line((frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)):
                return place
    return code_line((entry.filename, entry.lineno) for entry in reversed(caught) if _is_tracer_warning(entry))


def _is_tracer_warning(entry: warnings.WarningMessage) -> bool:
    return issubclass(entry.category, TracerWarning) and is_user_code(entry.filename)
