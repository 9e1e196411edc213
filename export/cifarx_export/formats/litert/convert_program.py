"""Convert an exported program to a LiteRT model, in a process of its own.

Its arguments are those of `main`: PROGRAM MODEL OUTPUT.

litert-torch imports JAX, which starts threads and takes 900 MB, and its compiler writes to standard error and ends the
process on an error of its own.
"""

import sys
from pathlib import Path

import torch

from cifarx_export.formats.litert.model_bytes import rewrite


def main(program: Path, model: Path, output: str) -> None:
    """Convert a program.

    Args:
        program: a file of `torch.export.save`, with its example input.
        model: the file to write.
        output: the name of the model's output.
    """
    import litert_torch

    loaded = torch.export.load(program)
    images = loaded.example_inputs[0]
    converted = litert_torch.convert(loaded.module(), images)
    model.write_bytes(rewrite(converted.model_content(), output))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
