"""The commands by name. A command's module is imported when the command is asked for, and not before."""

from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command as build_command

import cifarx
from cifarx_serve.errors import unknown_name_error

COMMANDS: Final = ("train", "export", "verify", "infer", "bench", "serve", "inspect", "doctor", "demo")
"""Each is the function `command` in the module `cifarx.commands.<name>`, in the order of the help page."""


class LazyCommands(TyperGroup):
    """Imports one command's module for one command, and all of them for the help page alone."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            if cmd_name.startswith("-"):
                return None  # the parser names a wrong option better
            raise unknown_name_error("command", cmd_name, COMMANDS)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(import_module(f"cifarx.commands.{cmd_name}").command)
        command = build_command(single)
        command.name = cmd_name
        return command


_typer = typer.Typer(
    cls=LazyCommands, add_completion=False, no_args_is_help=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@_typer.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Take an image classifier from training to deployment and check every step.

    `cifarx train --model lzh`, `cifarx export --ckpt lzh_9.pth --format onnx`,
    `cifarx infer dog.png --backend onnxruntime`. Exit status: 0 it holds, 1 a check failed, 2 wrong input or usage.
    """
    if version:
        typer.echo(cifarx.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app = build_command(_typer)
