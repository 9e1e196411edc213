"""The text that tells NVIDIA Triton of an ONNX model: its `config.pbtxt` and its labels.

The fields are those of `ModelConfig`, in `protobuf/model_config.proto` of triton-inference-server/common.
"""

from typing import Final

from cifarx_export.parity.compare import WHOLE_BATCH
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.spec import ModelSpec

LABELS_FILE: Final = "labels.txt"

PREFERRED_BATCHES: Final = (4, 8, 16, 32)
"""Sizes at which a batch leaves the queue at once, beside the largest."""

QUEUE_DELAY_US: Final = 200
"""How long a request may wait for others: no longer than the smallest network takes for one image on a CPU."""

# ONNX Runtime allows TF32 unless told not to, and what was proved was fp32; see `onnxruntime_backend`.
_CUDA_OPTIONS: Final = """\
optimization {
  execution_accelerators {
    gpu_execution_accelerator [
      {
        name: "cuda"
        parameters { key: "use_tf32" value: "0" }
        parameters { key: "cudnn_conv_algo_search" value: "HEURISTIC" }
      }
    ]
  }
}"""


def triton_config(spec: ModelSpec, name: str) -> str:
    """The `config.pbtxt` of a model in a folder of that name.

    Triton makes no batch larger than the largest that was proved. Where an instance runs is left to Triton: on
    every GPU there is, else on the CPU. The parameter `cifarx.spec` gives clients the whole spec, preprocessing and
    class names, at `GET /v2/models/{name}/config`.
    """
    largest = max(spec.parity.batch_sizes) if spec.parity else WHOLE_BATCH
    preferred = [*(size for size in PREFERRED_BATCHES if size < largest), largest]
    taken = spec.input
    data_type, dims = ("TYPE_FP32", [taken.channels, taken.height, taken.width])
    if spec.embedded_preprocessing:
        data_type, dims = ("TYPE_UINT8", [-1, -1, taken.channels])
    return f"""\
name: {quoted(name)}
backend: "onnxruntime"
platform: "onnxruntime_onnx"
default_model_filename: "model.onnx"
max_batch_size: {largest}
input [ {{ name: "input" data_type: {data_type} dims: {dims} }} ]
output [
  {{
    name: "logits"
    data_type: TYPE_FP32
    dims: [{len(spec.class_names)}]
    label_filename: "{LABELS_FILE}"
  }}
]
dynamic_batching {{
  preferred_batch_size: {preferred}
  max_queue_delay_microseconds: {QUEUE_DELAY_US}
}}
instance_group [ {{ kind: KIND_AUTO count: 1 }} ]
version_policy: {{ latest: {{ num_versions: 1 }} }}
{_CUDA_OPTIONS}
parameters {{
  key: "{SPEC_KEY}"
  value: {{ string_value: {quoted(spec.to_json())} }}
}}
"""


def labels(spec: ModelSpec) -> str:
    """The class names in label order, one a line; Triton has no way to write a line break inside one."""
    return "".join(" ".join(name.splitlines()) + "\n" for name in spec.class_names)


def quoted(text: str) -> str:
    """A string of Protocol Buffers' text format: what is not printable ASCII as octal bytes of its UTF-8."""
    return '"' + "".join(_escaped(byte) for byte in text.encode()) + '"'


def _escaped(byte: int) -> str:
    if byte in b'"\\':
        return "\\" + chr(byte)
    return chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}"
