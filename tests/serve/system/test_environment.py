import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import PIL

import cifarx_serve
from cifarx_serve.system.cpus import available_cpus
from cifarx_serve.system.environment import Environment, current_environment
from cifarx_serve.system.versions import library_versions


def test_the_environment_describes_this_process() -> None:
    here = current_environment()
    assert platform.system() in here.system
    assert platform.machine() in here.system
    assert here.python == platform.python_version()
    assert here.cpu.strip() == here.cpu != ""
    assert here.cpus == os.cpu_count()
    assert here.threads == available_cpus()
    assert here.versions == library_versions()


def test_json_round_trip() -> None:
    here = current_environment()
    assert msgspec.json.decode(msgspec.json.encode(here), type=Environment) == here


def test_the_versions_are_those_of_the_imported_libraries() -> None:
    versions = library_versions()
    assert versions["numpy"] == np.__version__
    assert versions["pillow"] == PIL.__version__
    assert versions["torch"] == version("torch")
    assert "onnxruntime-gpu" in versions or "onnxruntime" in versions


def test_libraries_that_are_not_installed_are_omitted() -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from cifarx_serve.system.versions import library_versions; print(library_versions())"
    )
    packages = Path(cifarx_serve.__file__).parents[1]
    # Isolated mode without site-packages: nothing is installed in this Python.
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code, packages], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "{}"


def test_no_library_is_imported(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from cifarx_serve.system.environment import current_environment; current_environment()\n"
        "print(*{'torch', 'onnxruntime', 'onnx', 'numpy', 'PIL'} & set(sys.modules))"
    )
    assert fresh_python(code) == ""
