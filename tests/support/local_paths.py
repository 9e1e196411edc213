"""Check that an artifact does not contain paths of the machine that exported it."""

import os
import sys
import sysconfig
from pathlib import Path


def assert_no_local_paths(content: bytes) -> None:
    """Fail if the content contains a directory of this machine."""
    directories = {
        Path.cwd(),
        Path.home(),
        Path(__file__).parents[2],
        Path(sys.prefix),
        Path(sysconfig.get_path("purelib")),
    }
    for directory in directories - {Path("/")}:
        assert os.fsencode(directory) not in content
