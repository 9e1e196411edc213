"""Run the files of `torch.export`, `.pt2`, on any PyTorch device."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cifarx_serve.backends.torch import exported_program_archive
from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceMemoryError, ModelFileError, error_message
from cifarx_serve.spec import ModelSpec


class ExportedProgramBackend(TorchBackend):
    """An exported program on a PyTorch device: a graph of PyTorch operators, for which PyTorch generates Python code.

    `torch.export.load` executes code from its file, so it is only given an archive whose content was checked; see
    `exported_program_archive`.
    """

    name = "exported_program"

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        archive = exported_program_archive.checked_archive(path)
        import torch
        from torch.export.passes import move_to_device_pass

        from cifarx_serve.backends.torch.device import torch_device
        from cifarx_serve.backends.torch.out_of_memory import report_out_of_memory

        target = torch_device(device)
        try:
            with _no_logging(), report_out_of_memory(target):
                program = torch.export.load(archive)
                if target.type != "cpu":
                    program = move_to_device_pass(program, target)
                # Guards are Python source code. Shapes are checked without them.
                module = program.module(check_guards=False)
        except DeviceMemoryError:
            raise
        except Exception as error:  # a damaged graph can raise any exception
            raise ModelFileError(
                f"{path} is not an exported program ({error_message(error)})", "export it again"
            ) from error
        self._init_module(module, target)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without PyTorch, because the archive is a zip file."""
        return exported_program_archive.read_spec(path)


@contextmanager
def _no_logging() -> Iterator[None]:
    """Suppress PyTorch's warnings and its log, which repeats with a traceback what is raised anyway."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
