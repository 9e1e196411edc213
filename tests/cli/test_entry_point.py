import subprocess
import sys

import pytest


def _program(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program after a line of Python."""
    code = f"import sys; sys.argv = ['cifarx', *sys.argv[1:]]; {before}\nfrom cifarx.__main__ import program; program()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("imported", ["pass", "sys.modules['torch'] = sys"])
@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["inspect", "absent.onnx"], 2)])
def test_the_exit_keeps_the_status_and_all_output(imported: str, arguments: list[str], status: int) -> None:
    result = _program(f"{imported}; sys.stdout.write('x' * 100_000)", *arguments)
    assert result.returncode == status
    assert len(result.stdout) >= 100_000
    assert ("absent.onnx" in result.stderr) == (status == 2)


def test_exit_handlers_run() -> None:
    result = _program("import atexit; atexit.register(lambda: print('exit handler'))", "--version")
    assert result.stdout.endswith("exit handler\n")


def test_garbage_collection_is_enabled_while_a_command_runs() -> None:
    result = _program(
        "import atexit, gc; atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000))", "--version"
    )
    assert result.stdout.endswith("True True\n")


def test_without_pytorch_the_interpreter_is_not_finalized() -> None:
    """Finalization takes long with ONNX Runtime. It would call `__del__` of an object that is still alive."""
    end = "lambda self, write=os.write: write(2, b'finalized')"
    held = f"import os; kept = type('Held', (), {{'__del__': {end}}})()"
    assert "finalized" not in _program(held, "--version").stderr
    assert "finalized" in _program(f"{held}; sys.exit(0)").stderr
