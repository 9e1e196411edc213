"""Test that exported programs run, and that no file can run code of its own."""

import io
import json
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.backends.torch.exported_program import ExportedProgramBackend
from cifarx_serve.backends.torch.exported_program_archive import SAMPLE_INPUTS
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, DeviceError, ModelFileError, SpecError
from tests.support.color_model import SPEC

CPU = Device("cpu")
PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"

Members = dict[str, bytes]


class Colors(nn.Module):
    """The mean of each color, ten times."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((3,), 10.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * self.gain


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = torch.export.export(
        Colors(), (torch.rand(2, 3, 4, 6),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    for node in program.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    program._example_inputs = None
    archive = io.BytesIO()
    torch.export.save(program, archive, extra_files={SPEC_FILE: SPEC.to_json()})
    path = tmp_path_factory.mktemp("made") / "colors.pt2"
    path.write_bytes(archive.getvalue())
    return path


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path: Path, content: Members, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, member in content.items():
            archive.writestr(f"archive/{name}", member)
    return path


def refused(path: Path, device: Device = CPU) -> CifarxError:
    with pytest.raises(CifarxError) as raised:
        ExportedProgramBackend(path, device)
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize("size", [1, 2, 5])
def test_logits(made_once: Path, size: int) -> None:
    batch = np.zeros((size, 3, 4, 6), np.float32)
    batch[0, 1] = 0.5
    with ExportedProgramBackend(made_once, CPU) as backend:
        logits = backend.run(batch)
        assert (backend.provider, backend.spec) == ("cpu", SPEC)
    assert (logits.dtype, logits.shape) == (np.float32, (size, 3))
    np.testing.assert_allclose(logits[0], [0, 5, 0], rtol=1e-6)


def test_an_archive_rewritten_from_the_same_members_runs_too(made_once: Path, tmp_path: Path) -> None:
    """So the archives in the tests below are refused only because of what these tests change."""
    with ExportedProgramBackend(write(tmp_path / "x.pt2", members(made_once)), CPU) as backend:
        assert backend.run(np.ones((1, 3, 4, 6), np.float32)).tolist() == [[10, 10, 10]]


def test_images_of_another_size_are_refused(made_once: Path) -> None:
    with ExportedProgramBackend(made_once, CPU) as backend, pytest.raises(Exception, match="4"):
        backend.run(np.zeros((1, 3, 5, 6), np.float32))


def test_reading_the_spec_does_not_import_pytorch(made_once: Path, fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from cifarx_serve.backends.torch.exported_program import ExportedProgramBackend as Backend\n"
        "print(Backend.read_spec(Path(sys.argv[1])).model, 'torch' in sys.modules)"
    )
    assert fresh_python(code, made_once) == "colors False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_cuda_without_a_gpu_is_an_error_with_the_reason(made_once: Path) -> None:
    error = refused(made_once, Device("cuda", 1))
    assert isinstance(error, DeviceError)
    assert error.problem.startswith("device cuda:1 was requested, but PyTorch cannot use it (")


@pytest.mark.gpu
def test_on_a_gpu(made_once: Path) -> None:
    with ExportedProgramBackend(made_once, Device("cuda", 0)) as backend:
        assert backend.provider == "cuda:0"
        np.testing.assert_allclose(backend.run(np.ones((3, 3, 4, 6), np.float32)), np.full((3, 3), 10), rtol=1e-5)


def program_with(content: Members, change: Callable[[dict[str, Any]], None], name: str = PROGRAM) -> Members:
    document = json.loads(content[name])
    change(document)
    return {**content, name: json.dumps(document).encode()}


def graph(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["graph_module"]["graph"]
    return found


def call_signature(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["graph_module"]["module_call_graph"][0]["signature"]
    return found


CODE = "open('it-ran','w')"

HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a size that SymPy evaluates": lambda d: graph(d)["tensor_values"]["images"]["sizes"][0].update(
        as_expr={"expr_str": f"__import__('os').system('{CODE}')", "hint": {"as_int": 2}}
    ),
    "a size with a call inside": lambda d: graph(d)["tensor_values"]["images"]["sizes"][0].update(
        as_expr={"expr_str": f"Mul(Integer(2), {CODE})", "hint": {"as_int": 2}}
    ),
    "a huge power": lambda d: graph(d)["tensor_values"]["images"]["sizes"][0].update(
        as_expr={"expr_str": "Pow(Integer(9), Pow(Integer(9), Integer(99)))", "hint": {"as_int": 2}}
    ),
    "a size with code in a division": lambda d: graph(d)["tensor_values"]["images"]["sizes"][0].update(
        as_expr={"expr_str": f"FloorDiv(Symbol('s77', positive=True, integer=True), {CODE})", "hint": {"as_int": 2}}
    ),
    "a size with a method of a number": lambda d: graph(d)["tensor_values"]["images"]["sizes"][0].update(
        as_expr={"expr_str": "Mod(Integer(2).__class__, Integer(2))", "hint": {"as_int": 2}}
    ),
    "guards": lambda d: d.update(guards_code=[CODE]),
    "a tree spec with a module to import": lambda d: call_signature(d).update(
        in_spec=json.dumps([1, {"type": "collections.defaultdict", "context": '{"default_factory_module": "this"}'}])
    ),
    "a name that is Python code": lambda d: graph(d)["inputs"][-1]["as_tensor"].update(name=f"images={CODE}"),
    "a name on two lines": lambda d: graph(d)["nodes"][0].update(name="x\n"),
    "a hidden name": lambda d: graph(d)["nodes"][0].update(name="x.__class__"),
    "an operator that calls any method": lambda d: graph(d)["nodes"][0].update(target="_operator.methodcaller"),
    "any function below torch": lambda d: graph(d)["nodes"][0].update(target="torch.load"),
    "an operator that opens files": lambda d: graph(d)["nodes"][0].update(target="torch.ops.aten.from_file.default"),
    "an extension's operator": lambda d: graph(d)["nodes"][0].update(target="#executorch:x"),
    "a graph in a graph": lambda d: graph(d)["nodes"][0]["inputs"][0].update(arg={"as_graph": {"name": "x"}}),
    "an object of a custom class": lambda d: graph(d)["nodes"][0]["inputs"][0].update(arg={"as_custom_obj": {}}),
    "metadata": lambda d: graph(d)["nodes"][0].update(metadata={"source_fn_stack": "x,torch.load"}),
    "a parameter name that is Python code": lambda d: d["graph_module"]["signature"]["input_specs"][0][
        "parameter"
    ].update(parameter_name=f'gain"+{CODE}+"'),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_graph_that_could_run_code(
    made_once: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "hostile.pt2", program_with(members(made_once), change))
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("the file was passed to PyTorch"))
    error = refused(path)
    assert isinstance(error, ModelFileError)
    assert "is not an exported program of cifarx" in error.problem
    assert not (tmp_path / "it-ran").exists()


def hostile_pickle() -> bytes:
    """Return a pickle that prints when it is loaded. It is assembled by hand, so that no test pickles or unpickles."""
    content = b"\x80\x02cbuiltins\nprint\n(X\x06\x00\x00\x00it rantR."
    assert "builtins print" in {argument for _, argument, _ in pickletools.genops(content) if argument}
    return content


HOSTILE_MEMBERS: dict[str, Callable[[Members], Members]] = {
    "example inputs": lambda content: {**content, SAMPLE_INPUTS: hostile_pickle()},
    "weights of the old format": lambda content: {**content, "data/weights/model.pt": hostile_pickle()},
    "constants of the old format": lambda content: {**content, "data/constants/model.pt": hostile_pickle()},
    "pickled weights": lambda content: program_with(
        {**content, "data/weights/weight_0": hostile_pickle()},
        lambda document: document["config"]["gain"].update(use_pickle=True),
        WEIGHTS,
    ),
    "an opaque constant": lambda content: program_with(
        {**content, "data/constants/opaque_obj_0": hostile_pickle()},
        lambda document: document["config"].update(
            x={"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        ),
        CONSTANTS,
    ),
    "a script object": lambda content: {**content, "data/constants/custom_obj_0": hostile_pickle()},
    "a compiled library": lambda content: {**content, "data/aotinductor/model/model.so": b"\x7fELF"},
    "a second program": lambda content: {**content, "models/other.json": content[PROGRAM]},
    "a way out of the folder": lambda content: {**content, "../../evil": b""},
    "another extra file": lambda content: {**content, "extra/other": b""},
    "weights from elsewhere": lambda content: program_with(
        content, lambda document: document["config"]["gain"].update(path_name="../../../x"), WEIGHTS
    ),
}


@pytest.mark.parametrize("change", HOSTILE_MEMBERS.values(), ids=HOSTILE_MEMBERS)
def test_an_archive_that_could_run_code(
    made_once: Path,
    tmp_path: Path,
    change: Callable[[Members], Members],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "hostile.pt2", change(members(made_once)))
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("the file was passed to PyTorch"))
    assert isinstance(refused(path), ModelFileError)
    assert "it ran" not in capfd.readouterr().out


def test_a_compressed_archive(made_once: Path, tmp_path: Path) -> None:
    """Compressed archives are refused because a few bytes can unpack to many."""
    path = write(
        tmp_path / "x.pt2", {**members(made_once), "data/weights/weight_0": bytes(10**7)}, zipfile.ZIP_DEFLATED
    )
    assert "compressed" in refused(path).problem
    assert isinstance(unreadable(path), ModelFileError)


def test_overlapping_members(made_once: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members(made_once).items():
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/data/weights/weight_1", bytes(5000))
        for number in range(2, 9):  # more entries for the same bytes
            entry = zipfile.ZipInfo(f"archive/data/weights/weight_{number}")
            first = archive.getinfo("archive/data/weights/weight_1")
            entry.header_offset, entry.CRC = first.header_offset, first.CRC
            entry.file_size = entry.compress_size = first.file_size
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
    assert "declare more bytes than the file has" in refused(path).problem


def test_a_duplicate_member(made_once: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for name, content in [*members(made_once).items(), (PROGRAM, b"{}")]:
            archive.writestr(f"archive/{name}", content)
    assert "one is duplicated" in refused(path).problem


def unreadable(path: Path) -> CifarxError:
    with pytest.raises(CifarxError) as raised:
        ExportedProgramBackend.read_spec(path)
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize("content", [b"", b"this is not a model", b"\0" * 1000, b"PK\x03\x04" + b"x" * 100])
def test_files_that_are_not_archives(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(content)
    for error in (refused(path), unreadable(path)):
        assert isinstance(error, ModelFileError)
        assert error.problem.startswith(f"{path} is not an exported program")


def test_a_truncated_file(made_once: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.pt2"
    path.write_bytes(made_once.read_bytes()[: made_once.stat().st_size // 2])
    assert isinstance(refused(path), ModelFileError)


def test_a_checkpoint_with_the_wrong_suffix(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    torch.save({"weight": torch.zeros(3)}, path)
    assert isinstance(refused(path), ModelFileError)


def test_a_program_of_another_exporter(made_once: Path, tmp_path: Path) -> None:
    content = members(made_once)
    del content[f"extra/{SPEC_FILE}"]
    path = write(tmp_path / "theirs.pt2", content)
    assert refused(path).problem == unreadable(path).problem == f"{path} contains no model spec"


def test_a_spec_that_cannot_be_read(made_once: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt2", {**members(made_once), f"extra/{SPEC_FILE}": b"{}"})
    assert isinstance(refused(path), SpecError)


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS, CONSTANTS, SAMPLE_INPUTS, "data/weights/weight_0"])
def test_a_missing_member(made_once: Path, tmp_path: Path, name: str) -> None:
    content = members(made_once)
    del content[name]
    assert isinstance(refused(write(tmp_path / "x.pt2", content)), ModelFileError)


@pytest.mark.parametrize("document", [b"", b"[", b"[" * 10**5, b"[]", b"{}", b'{"graph_module": 1}'])
def test_an_invalid_program(made_once: Path, tmp_path: Path, document: bytes) -> None:
    assert isinstance(refused(write(tmp_path / "x.pt2", {**members(made_once), PROGRAM: document})), ModelFileError)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(-9000, -1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_opens_or_raises_our_own_exceptions(
    made_once: Path, tmp_path: Path, damage: list[tuple[int, int]]
) -> None:
    damaged = bytearray(made_once.read_bytes())
    for place, byte in damage:
        damaged[place % len(damaged)] = byte
    path = tmp_path / "damaged.pt2"
    path.write_bytes(damaged)
    try:
        ExportedProgramBackend(path, CPU).close()
    except (ModelFileError, SpecError) as error:
        assert "\n" not in str(error)


def test_closing_twice(made_once: Path) -> None:
    backend = ExportedProgramBackend(made_once, CPU)
    backend.close()
    backend.close()
