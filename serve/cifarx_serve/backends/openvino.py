"""Run OpenVINO files, `.openvino.zip`: OpenVINO's model, `model.xml` and `model.bin`, and the spec.

The archive is not compressed, so `unzip` makes what OpenVINO's own tools read.
"""

import copy
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from cifarx_serve.backends.base import Backend, TensorInfo, parse_spec, require_file
from cifarx_serve.devices import Device, out_of_memory_error
from cifarx_serve.errors import DeviceError, FallbackWarning, ModelFileError, UsageError, error_message
from cifarx_serve.files.zip_safety import read_member, require_safe_archive
from cifarx_serve.spec import ModelSpec, Precision
from cifarx_serve.system.cpus import available_cpus

if TYPE_CHECKING:
    import openvino

GRAPH_FILE: Final = "model.xml"
WEIGHTS_FILE: Final = "model.bin"
SPEC_FILE: Final = "cifarx_spec.json"
"""The members of the archive, in this order."""

# Control flow can run forever, and extensions are code of a library.
_LAYER: Final = re.compile(rb"<layer\b[^>]*>")
_TYPE: Final = re.compile(rb'\btype="([^"]*)"')
_STANDARD_VERSION: Final = re.compile(rb'\bversion="opset\d{1,3}"')
_UNBOUNDED: Final = frozenset({b"Loop", b"TensorIterator", b"If", b"ReadValue", b"Assign"})

_MAX_VALUES: Final = 1 << 28
"""The maximum number of values of a tensor for one image: 1 GiB of float32."""

_PRECISION_HINT: Final = "INFERENCE_PRECISION_HINT"
_CPU: Final = "CPU"
_DEVICES: Final[Mapping[str, str]] = MappingProxyType({"auto": _CPU, "cpu": _CPU, "gpu": "GPU", "npu": "NPU"})

_OUT_OF_MEMORY: Final = re.compile(r"bad_alloc|[Cc]annot allocate|out of memory")


class OpenVinoBackend(Backend):
    """A model that OpenVINO compiled for a device.

    By default, OpenVINO computes in bf16 on a CPU with instructions for it. Here it does so only if that is the
    precision of the file. On a GPU or an NPU, the device decides which precisions it has.
    """

    name = "openvino"
    suffixes: ClassVar[tuple[str, ...]] = (".openvino.zip",)

    def __init__(self, path: Path, device: Device) -> None:
        self.spec = self.read_spec(path)
        if device.type not in _DEVICES:
            supported = "runs on the CPU, or on the GPU or NPU of Intel"
            raise DeviceError(f"{path} {supported}, but {device.type} was requested", "use --device cpu")
        self._path = path
        self._device = _DEVICES[device.type]
        self._core, self._model = self.read_model(path)
        _require_device(self._core, self._device)
        self._compile(available_cpus())

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        """Return the spec of a file without OpenVINO, because the archive is a zip file."""
        require_file(path)
        require_safe_archive(path)
        return parse_spec(read_member(path, SPEC_FILE), path)

    @classmethod
    def read_model(cls, path: Path) -> "tuple[openvino.Core, openvino.Model]":
        """Read and check the model.

        Raises:
            UsageError: OpenVINO is not installed.
            ModelFileError: the model is damaged, or it could do more than compute tensors of a bounded size.
        """
        graph = read_member(path, GRAPH_FILE)
        if graph is None:
            raise ModelFileError(f"{path} has no {GRAPH_FILE}", "export it again")
        _require_safe_graph(graph, path)
        return read_graph(path, graph, _read_weights(path))

    @property
    def computed_precision(self) -> Precision:
        """The precision to compute in: bf16, or float32 for any other."""
        return self.spec.precision

    def _compile(self, threads: int) -> None:
        from openvino import Type

        wanted = Type.bf16 if self.computed_precision == "bf16" else Type.f32
        options: dict[str, Any] = {_PRECISION_HINT: wanted, "PERFORMANCE_HINT": "LATENCY"}
        if self._device == _CPU:
            # Pinned threads of several processes, such as the workers of a server, would share the first CPUs.
            options |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        try:
            self._compiled = compiled = self._core.compile_model(self._model, self._device, options)
            self._idle = [compiled.create_infer_request()]
            used = compiled.get_property(_PRECISION_HINT)
            devices = ",".join(compiled.get_property("EXECUTION_DEVICES"))
        except RuntimeError as error:
            raise _invalid_file(self._path, error) from error
        if used != wanted:
            warnings.warn(
                f"this {self._device} has no instructions for {self.spec.precision}: "
                f"OpenVINO computes in {used.get_type_name()}",
                FallbackWarning,
                stacklevel=4,
            )
        computed = f" in {used.get_type_name()}" if wanted == Type.bf16 else ""
        self.provider = f"OpenVINO {devices}{computed}"

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Run a batch. A request of OpenVINO serves one run at a time, so each of several runs at once has its own."""
        try:
            request = self._take_request()
            outputs: NDArray[np.float32] = request.infer({0: batch}, share_inputs=True)[0]
        except RuntimeError as error:
            if _OUT_OF_MEMORY.search(str(error)):
                raise out_of_memory_error("cpu", len(batch), None, None) from error
            problem = f"{self._path} cannot run on {batch.dtype} {batch.shape} ({library_message(error)})"
            raise ModelFileError(problem, "export it again") from error
        self._idle.append(request)
        return outputs

    def _take_request(self) -> "openvino.InferRequest":
        try:
            return self._idle.pop()
        except IndexError:  # all are in use
            return self._compiled.create_infer_request()

    def single_threaded(self) -> Backend:
        """Return a backend with the model compiled a second time, for one thread of the CPU."""
        if self._device != _CPU:
            return self
        other = copy.copy(self)
        other._compile(1)
        return other

    @property
    def runs_on_own_cpus(self) -> bool:
        return self._device == _CPU

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(
                port.get_any_name(),
                port.get_element_type().to_dtype().name,
                tuple(
                    size.get_length() if size.is_static else "any" if axis else "batch"
                    for axis, size in enumerate(port.get_partial_shape())
                ),
            )
            for port in [*self._model.inputs, *self._model.outputs]
        )

    def close(self) -> None:
        self._idle.clear()
        self._compiled = self._model = self._core = None


def _require_device(core: "openvino.Core", name: str) -> None:
    """Check that OpenVINO finds a device, such as `GPU`, which it also calls `GPU.0` where there are several."""
    found = core.available_devices
    if all(device.partition(".")[0] != name for device in found):
        problem = f"OpenVINO finds no {name} on this machine, but {' and '.join(found)}"
        raise DeviceError(problem, "use --device cpu, or install its driver")


def _read_weights(path: Path) -> NDArray[np.uint8]:
    try:
        with zipfile.ZipFile(path) as archive:
            return np.frombuffer(archive.read(WEIGHTS_FILE), np.uint8)
    except Exception as error:  # the exceptions of zipfile for damaged archives have no common base class
        raise ModelFileError(f"{path} has no {WEIGHTS_FILE} ({error_message(error)})", "export it again") from error


def read_graph(
    path: Path, graph: bytes, weights: NDArray[np.uint8] | None = None
) -> "tuple[openvino.Core, openvino.Model]":
    """Read a graph with OpenVINO, and check the sizes of its tensors.

    Args:
        path: the file, for messages.
        graph: an XML document of OpenVINO, or an ONNX model.
        weights: the weights, if they are not in the graph.

    Raises:
        UsageError: OpenVINO is not installed.
        ModelFileError: OpenVINO cannot read it, or a tensor is too large.
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise UsageError("OpenVINO is not installed", 'pip install "cifarx[openvino]"') from error
    core = openvino.Core()
    try:
        if weights is None:
            model = core.read_model(graph)
        else:
            tensor = openvino.Tensor(weights) if len(weights) else openvino.Tensor(openvino.Type.u8, [0])
            model = core.read_model(graph, tensor)
        for operation in model.get_ops():
            for output in operation.outputs():
                _require_bounded(output.get_partial_shape(), operation.get_friendly_name(), path)
    except (RuntimeError, UnicodeError) as error:  # a name may be anything
        raise _invalid_file(path, error) from error
    return core, model


def _require_safe_graph(graph: bytes, path: Path) -> None:
    for layer in _LAYER.findall(graph):
        kind = _TYPE.search(layer)
        if kind is None or kind[1] in _UNBOUNDED or not _STANDARD_VERSION.search(layer):
            shown = (kind[1] if kind else layer)[:40].decode("ascii", "replace")
            raise ModelFileError(f"{path} has a layer {shown!a}, which no export writes", "export it again")


def _require_bounded(shape: "openvino.PartialShape", name: str, path: Path) -> None:
    values = 1
    for size in shape if shape.rank.is_static else ():
        values *= 1 if size.is_dynamic else size.get_length()
    if values > _MAX_VALUES:
        raise ModelFileError(f"{path} has a tensor {name[:40]!a} of {values:,} values", "export it again")


def library_message(error: Exception) -> str:
    """Return what an error of OpenVINO says, on one line, without the places in its source code."""
    lines = [line.strip(" -") for line in str(error).splitlines() if not line.startswith(("Exception from", "Check '"))]
    reasons = [line for line in lines if line.startswith("No conversion rule")] or [line for line in lines if line]
    return reasons[0] if reasons else error_message(error)


def _invalid_file(path: Path, error: Exception) -> ModelFileError:
    return ModelFileError(f"{path} is not a model that OpenVINO runs ({library_message(error)})", "export it again")
