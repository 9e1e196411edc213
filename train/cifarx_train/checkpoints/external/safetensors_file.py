"""Read a safetensors file: tensors and a dict of strings, without any code."""

from pathlib import Path
from typing import NamedTuple

import torch

from cifarx_serve.errors import ModelFileError, error_message


class SafetensorsContent(NamedTuple):
    """The content of a file.

    Attributes:
        tensors: the tensors by name, on the CPU.
        metadata: the strings in `__metadata__`.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def load_safetensors(path: Path) -> SafetensorsContent:
    """Return the content of a file.

    Raises:
        ModelFileError: the file is damaged.
    """
    from safetensors import safe_open  # imported here because most checkpoints are in another format

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Copies, because the tensors would change with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except Exception as error:  # the library's exception, and that of PyTorch for a type it does not know
        problem = f"{path} is not a readable safetensors file ({error_message(error)})"
        raise ModelFileError(problem, "get the file again") from error
    return SafetensorsContent(tensors, metadata)
