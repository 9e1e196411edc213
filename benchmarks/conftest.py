"""The tables at the end: every backend that runs here, side by side, and what tests add; and what a missed limit is."""

from collections.abc import Generator
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.support.limits import LimitMissed
from benchmarks.support.measured_models import Models, exported
from cifarx.bench_report.writers import environment_line
from cifarx_serve.system.environment import environment
from cifarx_train.train import train

_ROWS = pytest.StashKey[list[tuple[str, ...]]]()
_TABLES = pytest.StashKey[list[Table]]()
_NOTES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--limits",
        choices=["judge", "tell"],
        default="judge",
        help="a figure of time outside its limit: a failure, or told as an expected one, where a machine is shared",
    )
    parser.addoption("--ckpt", type=Path, help="the checkpoint to measure; else a quick one on the built-in data")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS], config.stash[_TABLES], config.stash[_NOTES] = [], [], []
    config.option.benchmark_quiet = True  # its own tables have no agreement and no provider; -v shows them


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> list[tuple[str, ...]]:
    """Where a test puts its row of the table."""
    return pytestconfig.stash[_ROWS]


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> list[Table]:
    """Where a test puts a table of its own, to be printed after that one."""
    return pytestconfig.stash[_TABLES]


@pytest.fixture(scope="session")
def notes(pytestconfig: pytest.Config) -> list[str]:
    """Where a test puts a line to print below the table."""
    return pytestconfig.stash[_NOTES]


@pytest.fixture(scope="session")
def models(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The checkpoint of `--ckpt`, or of a short run on the built-in data, exported to every format."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint = pytestconfig.getoption("ckpt")
    if checkpoint is None:
        checkpoint = train("lzh", data="builtin", epochs=1, learning_rate=0.02, out=folder).checkpoints[-1]
    return exported(checkpoint, folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        call.excinfo is not None
        and call.excinfo.errisinstance(LimitMissed)
        and item.config.getoption("limits") == "tell"
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
    terminalreporter.write_line(environment_line(environment()))
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
