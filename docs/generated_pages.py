"""MkDocs hook: pages made from other files of the project.

The command-line reference comes from the typer commands; the results and the changelog live outside docs/.
"""

import html
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.core import TyperGroup

from cifarx.app import app

PROJECT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages; remove the files of docs/ that are not pages."""
    files.append(File.generated(config, "cli.md", content=cli_reference()))
    files.append(File.generated(config, "changelog.md", content=(PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")))
    for page in sorted((PROJECT / "benchmarks" / "results").glob("*.md")):
        files.append(File.generated(config, f"results/{page.name}", content=page.read_text(encoding="utf-8")))
    for file in list(files):
        if file.src_uri.endswith(".py"):
            files.remove(file)
    return files


def cli_reference() -> str:
    """Return the reference of every command as Markdown."""
    assert isinstance(app, TyperGroup)
    context = typer.Context(app, info_name="cifarx")
    sections = [_section(app.get_command(context, name)) for name in app.list_commands(context)]
    return "\n\n".join(["# Command line", app.help or "", *sections]) + "\n"


def _section(command: Any) -> str:
    context = typer.Context(command, info_name=f"cifarx {command.name}")
    usage = " ".join([f"cifarx {command.name}", *command.collect_usage_pieces(context)])
    lines = [f"## cifarx {command.name}", command.help or "", f"```text\n{usage}\n```"]
    rows = [row for parameter in command.get_params(context) if (row := _row(parameter, context))]
    lines.append("\n".join(["| option | meaning |", "| --- | --- |", *rows]))
    return "\n\n".join(lines)


def _row(parameter: Any, context: typer.Context) -> str:
    """Return a row of the table, or an empty string for a hidden parameter."""
    if getattr(parameter, "hidden", False):
        return ""
    record = parameter.get_help_record(context)
    assert record is not None
    name, text = (html.escape(cell).replace("|", "&#124;").replace("\n", " ") for cell in record)
    return f"| <code>{name}</code> | {text} |"
