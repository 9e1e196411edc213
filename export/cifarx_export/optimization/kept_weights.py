"""The weights that a study keeps, so that a search that goes on does not fine-tune the same network again."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.progress import Progress

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS: Final = "weights"
_HISTORY: Final = "history"


def save_weights(file: Path, module: "nn.Module", history: str) -> None:
    """Write the weights of a network, and in words how they were made.

    Raises:
        OutputError: the file cannot be written.
    """
    import torch

    with atomic_path(file) as temporary:
        torch.save({_WEIGHTS: module.state_dict(), _HISTORY: history}, temporary)


def load_weights(file: Path, module: "nn.Module", progress: Progress) -> str | None:
    """Load weights into a network and return how they were made, or None if there are none that it can take.

    A file that is damaged, or has the weights of another network, is reported and otherwise ignored: the weights can be
    made again.
    """
    from cifarx_train.checkpoints.external.torch_file import load_torch_file  # imports PyTorch

    if not file.is_file():
        return None
    try:
        content = load_torch_file(file)
        weights, history = content[_WEIGHTS], content[_HISTORY]
        copy.deepcopy(module).load_state_dict(weights)  # if it fails, some tensors are loaded already
    except ModelFileError as error:
        problem = str(error)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        problem = f"{file} has no weights of this network ({error_message(error)})"
    else:
        module.load_state_dict(weights)
        return str(history)
    progress(f"note: {problem}: fine-tuning again")
    return None
