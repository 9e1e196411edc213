"""TorchScript: `.torchscript.pt` files, on any device of PyTorch's. Legacy: PyTorch deprecated the format."""

import re
import warnings
from pathlib import Path
from typing import Final

from cifarx_serve.backends.base import require_file
from cifarx_serve.backends.torch.base import TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError
from cifarx_serve.spec import ModelSpec

SPEC_FILE: Final = "cifarx_spec.json"
"""The name of the model spec among a TorchScript archive's extra files."""


# What TorchScript has to reach beyond its own tensors: files to write, files to map, operators of other libraries, and
# a method that is called while the file is read. `torch._C._jit_get_all_schemas()` lists all that there is.
_REACHES_OUT: Final = re.compile(
    rb"\b(save|from_file|__setstate__|__torch__\.torch\.classes|ops\.(?!aten\b|prim\b)\w+)\b"
)


class TorchScriptBackend(TorchBackend):
    """A loaded script module.

    A file holds no Python but TorchScript, compiled when it is opened and run on every batch. Code that could write a
    file, or that would run at the opening, is refused: an export holds operations on tensors alone.
    """

    name = "torchscript"
    suffixes = (".torchscript.pt",)

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        _require_harmless(path)
        import torch

        from cifarx_serve.backends.torch.device import torch_device

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
        self._hold(module, place)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Needs no PyTorch: the archive is a zip file."""
        # Here, because the registry imports this module to learn its suffix.
        from cifarx_serve.files.zip_safety import read_member, require_sound_archive

        require_file(path)
        require_sound_archive(path)
        document = read_member(path, f"/extra/{SPEC_FILE}")
        if document is None:
            raise ModelFileError(f"{path} carries no model spec", "make it with `cifarx export`")
        return ModelSpec.from_json(document, str(path))


def _require_harmless(path: Path) -> None:
    from cifarx_serve.files.zip_safety import read_members

    for code in read_members(path, ".py").values():
        if found := _REACHES_OUT.search(code):
            raise ModelFileError(
                f"{path} holds code that reaches beyond its tensors ({found[0].decode()})", "it is not opened"
            )
