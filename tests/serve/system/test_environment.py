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
from cifarx_serve.system.environment import Environment, environment
from cifarx_serve.system.versions import library_versions


def test_says_what_this_process_runs_on() -> None:
    here = environment()
    assert platform.system() in here.system
    assert platform.machine() in here.system
    assert here.python == platform.python_version()
    assert here.cpu.strip() == here.cpu != ""
    assert here.cpus == os.cpu_count()
    assert here.threads == available_cpus()
    assert here.versions == library_versions()


def test_gpus_are_those_of_the_driver() -> None:
    folder = Path("/proc/driver/nvidia/gpus")
    found = len(list(folder.iterdir())) if folder.is_dir() else 0
    assert len(environment().gpus) == found
    assert all(environment().gpus)


def test_travels_as_json() -> None:
    here = environment()
    assert msgspec.json.decode(msgspec.json.encode(here), type=Environment) == here


def test_versions_are_of_the_libraries_in_use() -> None:
    versions = library_versions()
    assert versions["numpy"] == np.__version__
    assert versions["pillow"] == PIL.__version__
    assert versions["torch"] == version("torch")
    assert "onnxruntime-gpu" in versions or "onnxruntime" in versions


def test_what_is_not_installed_is_left_out() -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from cifarx_serve.system.versions import library_versions; print(library_versions())"
    )
    rooms = Path(cifarx_serve.__file__).parents[1]
    # Isolated and without site-packages: a Python in which nothing is installed.
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code, rooms], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "{}"


def test_asking_loads_no_library(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from cifarx_serve.system.environment import environment; environment()\n"
        "print(*{'torch', 'onnxruntime', 'onnx', 'numpy', 'PIL'} & set(sys.modules))"
    )
    assert fresh_python(code) == ""
