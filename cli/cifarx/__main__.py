"""The program `cifarx` as a process: quick to start, and quick to end. What it does is in `main`."""

import atexit
import gc
import os
import sys
from typing import NoReturn


def program() -> NoReturn:
    """Run the command line and end the process with its exit status.

    Imports make 40,000 objects and no garbage, so none is looked for until they are done. At the end the system
    takes back what ONNX Runtime's libraries hold, a fifth of the time of a `cifarx infer` faster than they would give
    it. PyTorch has threads and process groups, which must end in order.
    """
    gc.disable()
    from cifarx.main import main

    gc.freeze()
    gc.enable()
    try:
        main()
    except SystemExit as end:
        if "torch" in sys.modules or not isinstance(end.code, int):
            raise
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(end.code)


if __name__ == "__main__":
    program()
