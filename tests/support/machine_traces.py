"""What an artifact must not say of the machine that made it."""

import os
import sys
import sysconfig
from pathlib import Path


def require_no_folders(content: bytes) -> None:
    """Fail where a folder of this machine is named."""
    folders = {
        Path.cwd(),
        Path.home(),
        Path(__file__).parents[2],
        Path(sys.prefix),
        Path(sysconfig.get_path("purelib")),
    }
    for folder in folders - {Path("/")}:
        assert os.fsencode(folder) not in content
