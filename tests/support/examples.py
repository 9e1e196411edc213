"""Runs the examples as a user does."""

import sys
from pathlib import Path

from tests.support.command_line import CommandResult, run_program

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: object) -> CommandResult:
    """Run a Python example, with warnings as errors."""
    return run_program(sys.executable, "-W", "error", EXAMPLES / name, *arguments)
