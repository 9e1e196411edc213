import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY, OnnxRuntimeBackend
from cifarx_serve.backends.onnxruntime.model_reader import minimum_onnxruntime, read_model_info
from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError, UsageError
from tests.support.color_model import SPEC, write_onnx
from tests.support.trained_model import Trained

CPU = Device("cpu")


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


def problem(path: Path) -> str:
    """Return why a file is refused, which must not take long."""
    started = time.perf_counter()
    with pytest.raises(ModelFileError) as raised:
        read_model_info(path)
    assert time.perf_counter() - started < 5
    assert raised.value.problem.startswith(str(path))
    assert "\n" not in str(raised.value)
    return raised.value.problem


def changed(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


# --- metadata


def test_the_metadata_is_that_of_the_onnx_library_and_the_runtime(trained: Trained) -> None:
    found, model = read_model_info(trained.onnx), onnx.load(trained.onnx)
    assert found.ir_version == model.ir_version
    assert found.opsets == {entry.domain: entry.version for entry in model.opset_import}
    session = onnxruntime.InferenceSession(trained.onnx, providers=["CPUExecutionProvider"])
    stated = session.get_modelmeta().custom_metadata_map
    assert {key.decode(): value.decode() for key, value in found.metadata.items()} == stated
    assert SPEC_KEY in stated


def test_the_last_entry_of_a_key_counts_as_in_the_runtime(colors: Path) -> None:
    for key, value in (("twice", "1"), ("twice", "2"), ("", "none"), ("empty", "")):
        colors.write_bytes(colors.read_bytes() + field(14, field(1, key.encode()) + field(2, value.encode())))
    # The last field within an entry counts too.
    colors.write_bytes(
        colors.read_bytes() + field(14, field(1, b"a") + field(2, b"1") + field(2, b"2") + field(1, b"b"))
    )
    stated = (
        onnxruntime.InferenceSession(colors, providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    )
    assert {key.decode(): value.decode() for key, value in read_model_info(colors).metadata.items()} == stated
    assert stated["twice"] == "2"
    assert stated["b"] == "2"


def test_every_type_of_tensor_is_accepted(colors: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        values = np.arange(6).reshape(2, 3)
        for kind in (np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64, np.uint64, np.bool_):
            model.graph.initializer.append(numpy_helper.from_array(values.astype(kind), np.dtype(kind).name))
        for number, data_type in enumerate(
            (TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE, TensorProto.INT4, TensorProto.BFLOAT16)
        ):
            model.graph.initializer.append(helper.make_tensor(f"typed{number}", data_type, [2, 3], [1, 2, 3, 4, 5, 6]))
        words = np.array([b"", b"word"], object)
        model.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [2], words))
        model.graph.initializer.append(helper.make_tensor("scalar", TensorProto.FLOAT, [], [1.0]))
        model.graph.initializer.append(helper.make_tensor("none", TensorProto.FLOAT, [0, 3], []))

    assert read_model_info(changed(colors, add)).metadata[SPEC_KEY.encode()] == SPEC.to_json().encode()


# --- refused files


def external(tensor: TensorProto, location: str = "../../etc/passwd") -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def in_graph(model: onnx.ModelProto) -> None:
    external(model.graph.initializer[0])


def in_attribute(model: onnx.ModelProto) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(3, np.float32)))
    external(constant.attribute[0].t)
    model.graph.node.append(constant)


def in_subgraph(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "t")
    external(tensor)
    inner = helper.make_graph([helper.make_node("Identity", ["t"], ["o"])], "g", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


def in_function(model: onnx.ModelProto) -> None:
    constant = helper.make_node("Constant", [], ["o"], value=numpy_helper.from_array(np.zeros(3, np.float32)))
    external(constant.attribute[0].t)
    model.functions.append(helper.make_function("own", "f", [], ["o"], [constant], [helper.make_opsetid("", 17)]))


@pytest.mark.parametrize("place", [in_graph, in_attribute, in_subgraph, in_function])
def test_weights_in_another_file(colors: Path, place: Callable[[onnx.ModelProto], None]) -> None:
    assert "stores its weights in another file ('../../etc/passwd')" in problem(changed(colors, place))


def test_weights_in_another_file_without_a_name(colors: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].data_location = TensorProto.EXTERNAL

    assert "in another file (unnamed)" in problem(changed(colors, change))


@pytest.mark.parametrize("dims", [[1 << 40], [1 << 20, 1 << 20], [3, 3, 1000], [1 << 62, 1 << 62, 4], [-1], [-3, -3]])
def test_tensors_that_declare_more_elements_than_they_contain(colors: Path, dims: list[int]) -> None:
    def change(model: onnx.ModelProto) -> None:
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(dims)

    assert "has a tensor" in problem(changed(colors, change))


def test_sparse_tensors(colors: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        values = numpy_helper.from_array(np.ones(1, np.float32), "s")
        indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))

    assert "sparse" in problem(changed(colors, change))


def test_functions(colors: Path) -> None:
    """ONNX Runtime expands functions when it opens a file. Twenty that each call another one twice take hours."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]

    def add(model: onnx.ModelProto) -> None:
        for number in range(20):
            name, domain = (f"F{number - 1}", "own") if number else ("Relu", "")
            nodes = [helper.make_node(name, [source], [to], domain=domain) for source, to in ("xt", "ty")]
            model.functions.append(helper.make_function("own", f"F{number}", ["x"], ["y"], nodes, opsets))

    assert "contains functions" in problem(changed(colors, add))


@pytest.mark.parametrize("depth", [40, 5000])
def test_deeply_nested_graphs(colors: Path, depth: int) -> None:
    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))  # a node with an attribute that is a graph
    colors.write_bytes(b"\x08\x0a" + field(7, graph))
    assert "messages deep" in problem(colors)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (field(14, b"\x0a\0") * 300_000, "fields outside its weights"),
        (field(14, field(1, b"k") + field(2, bytes(5 << 20))), "bytes of metadata"),
        (field(7, field(5, field(1, b"\x01" * 600_000))), "fields outside its weights"),
        (b"\x3a" + varint(1 << 62), "a field of"),
        (b"\x3a" + b"\xff" * 100, "an unterminated varint"),
        (b"\xff" * 1000, "an unterminated varint"),
        (b"\x3b\x3c", "invalid wire type 3"),
        (b"\0", "invalid field number 0"),
    ],
    ids=["a million fields", "metadata", "dimensions", "overrun", "length", "key", "group", "zero"],
)
def test_hostile_bytes(colors: Path, content: bytes, words: str) -> None:
    colors.write_bytes(colors.read_bytes() + content)
    assert words in problem(colors)


@pytest.mark.parametrize("content", [b"", b"\x08\x0a", field(7, b""), b"\x08\0" + field(7, b""), b"\x39" + bytes(8)])
def test_messages_that_are_not_a_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert "is not a valid ONNX model" in problem(path)


@settings(max_examples=300)
@example(content=b"\x08\x0a\x3a\x00")
@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_raise_our_own_exceptions(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(content)
    try:
        read_model_info(path)
    except ModelFileError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=5),
    cut=st.none() | st.integers(0, 2000),
)
def test_a_damaged_model_is_read_or_raises_our_own_exceptions(
    colors: Path, damage: list[tuple[int, int]], cut: int | None
) -> None:
    whole = bytearray(write_onnx(colors).read_bytes())
    for place, byte in damage:
        whole[place % len(whole)] = byte
    colors.write_bytes(whole[:cut])
    try:
        read_model_info(colors)
    except ModelFileError as error:
        assert "\n" not in str(error)


def test_a_file_of_half_a_gigabyte_is_read_quickly_and_in_little_memory(
    tmp_path: Path, fresh_python: Callable[..., str]
) -> None:
    path = write_onnx(tmp_path / "large.onnx")
    size = 537 << 20
    tensor = field(1, varint(size >> 2)) + b"\x10\x01" + b"\x4a" + varint(size)  # dims, float32, raw_data
    graph = b"\x2a" + varint(len(tensor) + size) + tensor
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(b"\x3a" + varint(len(graph) + size) + graph)
        file.truncate(file.tell() + size)
    code = (
        "import resource, sys, time; from cifarx_serve.backends.registry import read_spec\n"
        "import cifarx_serve.backends.onnxruntime.backend, cifarx_serve.backends.torch.torchscript\n"
        "before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()\n"
        "print(read_spec(sys.argv[1]).model, time.perf_counter() - started < 1)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 40)"
    )
    assert fresh_python(code, path).split() == ["colors", "True", "True"]


# --- files that need much memory only when they are opened or run


def growing(kind: str, elements: int) -> bytes:
    """Return a model that computes `elements` floats from constants of a few bytes."""
    size = numpy_helper.from_array(np.array([elements >> 10], np.int64), "size")
    factor = numpy_helper.from_array(np.array([1 << 10], np.int64), "factor")
    one = numpy_helper.from_array(np.array([1], np.float32), "one")
    make = {
        "ConstantOfShape": helper.make_node("ConstantOfShape", ["shape"], ["big"]),
        "Expand": helper.make_node("Expand", ["one", "shape"], ["big"]),
        "Tile": helper.make_node("Tile", ["one", "shape"], ["big"]),
    }[kind]
    nodes = [
        helper.make_node("Mul", ["size", "factor"], ["shape"]),
        make,
        helper.make_node("ReduceMax", ["big"], ["largest"], keepdims=0),
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Add", ["means", "largest"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "growing",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [size, factor, one],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    model.metadata_props.add(key=SPEC_KEY, value=SPEC.to_json())
    return bytes(model.SerializeToString())


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS works only on Linux")
@pytest.mark.parametrize("kind", ["ConstantOfShape", "Expand", "Tile"])
@pytest.mark.parametrize("elements", [1 << 30, 1 << 40], ids=["4 GiB", "4 TiB"])
def test_growing_constants_take_no_memory_when_opened_and_raise_when_run(
    tmp_path: Path, kind: str, elements: int, fresh_python: Callable[..., str]
) -> None:
    path = tmp_path / "growing.onnx"
    path.write_bytes(growing(kind, elements))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "import numpy as np, onnxruntime; from cifarx_serve.backends.registry import open_backend\n"
        "from cifarx_serve.errors import DeviceMemoryError, ModelFileError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "backend = open_backend(sys.argv[1], device='cpu')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 40)\n"
        "try: backend.run(np.ones((1, 3, 4, 6), np.float32))\n"
        "except DeviceMemoryError as error: print('cpu is out of memory' in error.problem)\n"
        "except ModelFileError as error: print('cannot run on' in error.problem)"
    )
    assert fresh_python(code, path).split() == ["True", "True"]


# --- minimum runtime


@pytest.mark.parametrize(
    ("ir_version", "opset", "minimum"),
    [
        (6, 11, "1.2"),
        (7, 12, "1.3"),
        (7, 13, "1.6"),
        (7, 14, "1.8"),
        (8, 15, "1.9"),
        (8, 16, "1.11"),
        (8, 17, "1.12"),
        (8, 11, "1.9"),
        (8, 18, "1.14"),
        (10, 18, "1.18"),
        (9, 20, "1.17"),
        (10, 21, "1.18"),
        (10, 22, "1.21"),
        (10, 23, "1.23"),
        (11, 18, "1.23"),
    ],
)
def test_the_minimum_runtime(ir_version: int, opset: int, minimum: str) -> None:
    assert minimum_onnxruntime(ir_version, opset) == minimum


def test_an_opset_that_no_known_runtime_supports() -> None:
    with pytest.raises(UsageError, match="opset 999"):
        minimum_onnxruntime(10, 999)


def test_the_installed_runtime_supports_the_opsets_in_the_table(colors: Path) -> None:
    here = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    for opset in range(11, 24):
        assert tuple(map(int, minimum_onnxruntime(10, opset).split("."))) <= here
        OnnxRuntimeBackend(write_onnx(colors, opset=opset), CPU).close()
