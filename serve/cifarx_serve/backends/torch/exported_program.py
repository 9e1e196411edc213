"""ExportedProgram: `.pt2` files of `torch.export`, on any device of PyTorch's."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cifarx_serve.backends.torch import exported_program_archive
from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError
from cifarx_serve.spec import ModelSpec


class ExportedProgramBackend(TorchBackend):
    """A loaded program: a graph of PyTorch's operators, run by Python that PyTorch writes for it.

    `torch.export.load` trusts its file with code, and is given none that is not checked:
    see `exported_program_archive` for what a file may hold.
    """

    name = "exported_program"
    suffixes = (".pt2",)

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        archive = exported_program_archive.checked_archive(path)
        import torch
        from torch.export.passes import move_to_device_pass

        from cifarx_serve.backends.torch.device import torch_device

        place = torch_device(device)
        try:
            with _quiet():
                program = torch.export.load(archive)
                if place.type != "cpu":
                    program = move_to_device_pass(program, place)
                module = program.module(check_guards=False)  # they are Python source; shapes are checked without
        except Exception as error:  # a damaged graph raises whatever the code that meets it does
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelFileError(f"{path} is not an exported program ({reason})", "export it again") from error
        self._hold(module, place)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Needs no PyTorch: the archive is a zip file."""
        return exported_program_archive.read_spec(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """What goes wrong is raised; PyTorch would log it as well, with a traceback."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
