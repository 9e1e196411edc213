"""The command-line parser. It imports the module of a command only when that command is used."""

from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command as build_command

import cifarx
from cifarx_serve.errors import unknown_name_error

COMMANDS: Final = (
    "train",
    "export",
    "verify",
    "adopt",
    "diagnose",
    "optimize",
    "infer",
    "bench",
    "serve",
    "inspect",
    "doctor",
    "demo",
)
"""The commands in the order of the help page. Each is the function `command` of the module `cifarx.commands.NAME`."""


class LazyGroup(TyperGroup):
    """A group of commands that imports one command to run it, and all commands only for the help page."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            if cmd_name.startswith("-"):
                return None  # the parser reports unknown options itself
            raise unknown_name_error("command", cmd_name, COMMANDS)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(import_module(f"cifarx.commands.{cmd_name}").command)
        command = build_command(single)
        command.name = cmd_name
        return command


_typer = typer.Typer(
    cls=LazyGroup, add_completion=False, no_args_is_help=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@_typer.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Take an image classifier from training to deployment and check every step.

    A first run: `cifarx train --model lzh`, then `cifarx export --ckpt lzh_9.pth --format onnx`, then
    `cifarx infer dog.png --backend onnxruntime`.

    Exit status: 0 on success, 1 if a check failed, 2 if the input or the usage is wrong.
    """
    if version:
        typer.echo(cifarx.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app = build_command(_typer)
