"""Commands that a test runs, and their results."""

import json
import os
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias


class CommandResult(NamedTuple):
    """Exit status, standard output and standard error of a command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, parsed as one JSON document."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The only line of standard error that starts with `error: `."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Cli: TypeAlias = Callable[..., CommandResult]


def run_program(*command: object, timeout_s: float = 240, **environment: str) -> CommandResult:
    """Run a program in the current directory, with additions to the environment."""
    ran = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=timeout_s,
    )
    return CommandResult(ran.returncode, ran.stdout, ran.stderr)
