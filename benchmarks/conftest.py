"""Options, fixtures and the tables of the benchmarks.

`pytest benchmarks/` runs the comparison of the backends alone. `--all`, or the name of a file, runs the others.
"""

from collections.abc import Generator
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.support.limits import LimitMissed
from benchmarks.support.models import Models, exported
from benchmarks.support.progress_bar import ProgressBar
from cifarx.bench_report.summary import environment_line
from cifarx_serve.system.environment import current_environment
from cifarx_train.train import train

COMPARISON = "test_backends.py"

_ROWS = pytest.StashKey[list[tuple[str, ...]]]()
_TABLES = pytest.StashKey[list[Table]]()
_NOTES = pytest.StashKey[list[str]]()
_BAR = pytest.StashKey[ProgressBar]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--limits",
        choices=["enforce", "report"],
        default="enforce",
        help="fail when a measured figure misses its limit, or report it as an expected failure (shared machines)",
    )
    parser.addoption("--all", action="store_true", help="run every benchmark, not only the comparison of backends")
    parser.addoption("--ckpt", type=Path, help="checkpoint to measure; default: a short run on the built-in data")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS], config.stash[_TABLES], config.stash[_NOTES] = [], [], []
    config.stash[_BAR] = ProgressBar()
    config.option.benchmark_quiet = True  # its own table lacks agreement and provider; -v shows it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the long benchmarks unless `--all` is given or their file is named."""
    if config.getoption("all"):
        return
    named = {Path(argument.partition("::")[0]).name for argument in config.args}
    kept = [item for item in items if item.path.name == COMPARISON or item.path.name in named]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> list[tuple[str, ...]]:
    """Return the list that collects the rows of the comparison table."""
    return pytestconfig.stash[_ROWS]


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> list[Table]:
    """Return the list that collects further tables, printed after the comparison."""
    return pytestconfig.stash[_TABLES]


@pytest.fixture(scope="session")
def notes(pytestconfig: pytest.Config) -> list[str]:
    """Return the list that collects lines to print below the tables."""
    return pytestconfig.stash[_NOTES]


@pytest.fixture(scope="session")
def bar(pytestconfig: pytest.Config) -> ProgressBar:
    """The progress bar of the session."""
    return pytestconfig.stash[_BAR]


@pytest.fixture(scope="session")
def models(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, bar: ProgressBar) -> Models:
    """Return the checkpoint of `--ckpt`, or one of a short run on the built-in data, exported to every format."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint = pytestconfig.getoption("ckpt")
    if checkpoint is None:
        with bar.stage("train lzh", share=0.1, steps=1):
            checkpoint = train("lzh", data="builtin", epochs=1, learning_rate=0.02, out=folder).checkpoints[-1]
    with bar.stage("export lzh", share=0.2, steps=10) as stage:
        return exported(checkpoint, folder, progress=stage)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        call.excinfo is not None
        and call.excinfo.errisinstance(LimitMissed)
        and item.config.getoption("limits") == "report"
    ):
        report.outcome, report.wasxfail = "skipped", f"limit missed: {call.excinfo.value}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, tables, notes = config.stash[_ROWS], config.stash[_TABLES], config.stash[_NOTES]
    if not rows and not tables and not notes:
        return
    terminalreporter.write_line("")
    for table in [_table(rows), *tables] if rows else tables:
        terminalreporter.write(_drawn(table))
    terminalreporter.write_line(environment_line(current_environment()))
    for note in notes:
        terminalreporter.write_line(note)


def _table(rows: list[tuple[str, ...]]) -> Table:
    headings = (
        "network",
        "backend",
        "provider",
        "batch",
        "p50 µs",
        "p90 µs",
        "p99 µs",
        "images/s",
        "speed-up",
        "agreement",
    )
    table = Table(*headings, title="one call, host memory to host memory; speed-up over PyTorch, measured in turns")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def _drawn(table: Table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
