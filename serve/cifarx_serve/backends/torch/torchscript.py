"""Run TorchScript files, `.torchscript.pt`, on any PyTorch device. PyTorch has deprecated this format."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cifarx_serve.backends.base import parse_spec, require_file
from cifarx_serve.backends.torch.base import SPEC_FILE, TorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceMemoryError, ModelFileError, error_message
from cifarx_serve.files.zip_safety import read_member, read_members, require_safe_archive
from cifarx_serve.spec import ModelSpec

if TYPE_CHECKING:
    import torch

# What TorchScript code can use beyond tensors: writing and mapping files, operators of other libraries, and a method
# that is called while the file is loaded. `torch._C._jit_get_all_schemas()` lists all operators. All but those
# of the two basic libraries are attributes of `ops`, which code could also give another name. Names of classes can have
# a part `ops`, as `__torch__.torchvision.ops.misc`.
_UNSAFE_CODE: Final = re.compile(
    rb"\b(?:save|from_file|__setstate__|__torch__\.torch\.classes)\b|(?<![\w.])ops\b(?!\.(?:aten|prim)\b)(?:\.\w+)?"
)


class TorchScriptBackend(TorchBackend):
    """A script module on a PyTorch device.

    The code in a file is TorchScript, not Python. It is compiled when the file is opened and runs on every batch. Code
    that could write a file, or that would run while the file is loaded, is refused: exported files contain only tensor
    operations.
    """

    name = "torchscript"

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)

        from cifarx_serve.backends.torch.device import torch_device

        target = torch_device(device)
        self._init_module(load_script_module(path, target), target)

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without PyTorch, because the archive is a zip file."""
        require_file(path)
        require_safe_archive(path)
        return parse_spec(read_member(path, f"/extra/{SPEC_FILE}"), path)


def load_script_module(path: Path, device: "torch.device") -> Any:
    """Load a TorchScript file, with or without a spec, after checks of its archive and its code.

    Returns:
        A `torch.jit.ScriptModule` on the device.

    Raises:
        ModelFileError: the file is missing or damaged, or its code could do more than compute tensors.
        DeviceMemoryError: the device does not have enough memory.
    """
    require_file(path)
    require_safe_archive(path)
    _require_safe_code(path)
    import torch

    from cifarx_serve.backends.torch.out_of_memory import report_out_of_memory

    try:
        with warnings.catch_warnings(), report_out_of_memory(device):
            # TorchScript is deprecated since torch 2.11; the user was warned at the export.
            warnings.simplefilter("ignore", category=FutureWarning)
            warnings.simplefilter("ignore", category=DeprecationWarning)
            return torch.jit.load(str(path), map_location=device)
    except DeviceMemoryError:
        raise
    except Exception as error:  # the exceptions of its C++ code for damaged files have no common base class
        raise ModelFileError(f"{path} is not a TorchScript file ({error_message(error)})", "export it again") from error


def _require_safe_code(path: Path) -> None:
    for code in read_members(path, ".py").values():
        if found := _UNSAFE_CODE.search(code):
            raise ModelFileError(
                f"{path} contains code that does more than compute tensors ({found[0].decode()})", "export it again"
            )
