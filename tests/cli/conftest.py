"""The command line, run in this process: PyTorch takes seconds to load, and once is enough."""

import sys

import pytest
from command_line import Cli, Ran

from cifarx.__main__ import main


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("infer", path, "--json")` as `cifarx infer PATH --json`."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["cifarx", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        status = ended.value.code
        assert isinstance(status, int)
        return Ran(status, *capfd.readouterr())

    return run
