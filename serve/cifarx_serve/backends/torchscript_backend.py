"""TorchScript: `.torchscript.pt` files, on any device of PyTorch's. Legacy: PyTorch deprecated the format."""

import warnings
from pathlib import Path
from typing import Final

from cifarx_serve.backends.base import require_file
from cifarx_serve.backends.torch_backend import TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError
from cifarx_serve.spec import ModelSpec

SPEC_FILE: Final = "cifarx_spec.json"
"""The name of the model spec among a TorchScript archive's extra files."""


class TorchScriptBackend(TorchBackend):
    """A loaded script module. Opening a file runs no Python of the file's: it holds TorchScript operations alone."""

    name = "torchscript"
    suffixes = (".torchscript.pt",)

    def __init__(self, path: Path, device: Device) -> None:
        require_file(path)
        import torch

        from cifarx_serve.backends.torch_device import torch_device

        place = torch_device(device)
        try:
            with warnings.catch_warnings():
                # Deprecated since torch 2.11; the user was told at the export.
                warnings.simplefilter("ignore", category=FutureWarning)
                warnings.simplefilter("ignore", category=DeprecationWarning)
                module = torch.jit.load(str(path), map_location=place)
        except Exception as error:  # what its C++ raises on damaged files has no common base
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelFileError(f"{path} is not a TorchScript file ({reason})", "export it again") from error
        self.spec = self.read_spec(path)
        self._hold(module, place)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Needs no PyTorch: the archive is a zip file."""
        import zipfile  # here, because the registry imports this module to learn its suffix

        require_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(f"/extra/{SPEC_FILE}")]
                document = archive.read(names[0]) if names else None
        except Exception as error:  # what zipfile raises on damaged archives has no common base
            reason = " ".join(str(error).split())
            raise ModelFileError(f"{path} is not a TorchScript file ({reason})", "export it again") from error
        if document is None:
            raise ModelFileError(f"{path} carries no model spec", "make it with `cifarx export`")
        return ModelSpec.from_json(document, str(path))
