import subprocess
import sys

import pytest


def _program(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program, after a line of Python."""
    code = f"import sys; sys.argv = ['cifarx', *sys.argv[1:]]; {before}\nfrom cifarx.__main__ import program; program()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("imported", ["pass", "sys.modules['torch'] = sys"])
@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["inspect", "absent.onnx"], 2)])
def test_its_status_and_all_it_printed_survive_its_end(imported: str, arguments: list[str], status: int) -> None:
    ran = _program(f"{imported}; sys.stdout.write('x' * 100_000)", *arguments)
    assert ran.returncode == status
    assert len(ran.stdout) >= 100_000
    assert ("absent.onnx" in ran.stderr) == (status == 2)


def test_what_was_to_be_done_at_the_end_is_done() -> None:
    ran = _program("import atexit; atexit.register(lambda: print('the end'))", "--version")
    assert ran.stdout.endswith("the end\n")


def test_garbage_is_looked_for_while_it_runs() -> None:
    ran = _program(
        "import atexit, gc; atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000))", "--version"
    )
    assert ran.stdout.endswith("True True\n")


def test_without_pytorch_the_interpreter_is_not_taken_apart() -> None:
    """Which takes long with ONNX Runtime's libraries, and shows in what an object's end would print."""
    end = "lambda self, write=os.write: write(2, b'taken apart')"
    held = f"import os; kept = type('Held', (), {{'__del__': {end}}})()"
    assert "taken apart" not in _program(held, "--version").stderr
    assert "taken apart" in _program(f"{held}; sys.exit(0)").stderr
