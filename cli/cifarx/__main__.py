"""The entry point of the `cifarx` program, which starts and ends its process as fast as possible."""

import atexit
import gc
import os
import sys
from typing import NoReturn


def program() -> NoReturn:
    """Run the command line and end the process with its exit status.

    Garbage collection is disabled during the imports, which create 40,000 objects and no garbage. At the end the
    process exits without destroying the objects of ONNX Runtime's libraries, which would take a fifth of the time of
    `cifarx infer`. PyTorch needs a regular exit because of its threads and process groups.
    """
    _open_closed_streams()
    gc.disable()
    from cifarx.main import main

    gc.freeze()
    gc.enable()
    try:
        main()
    except SystemExit as exit_request:
        if "torch" in sys.modules or not isinstance(exit_request.code, int):
            raise
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(exit_request.code)


def _open_closed_streams() -> None:
    """Connect the standard streams that the caller has closed, as with `>&-`, to the null device.

    Otherwise Python has no such stream, and the next file to be opened would get its descriptor.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest descriptor that is free
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    program()
