"""The configuration of an ONNX model for NVIDIA Triton: `config.pbtxt` and the labels.

The fields are those of the message `ModelConfig` in `protobuf/model_config.proto` of triton-inference-server/common.
"""

from typing import Final

from cifarx_export.parity.compare import EVAL_BATCH_SIZE
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.spec import ModelSpec

LABELS_FILE: Final = "labels.txt"

PREFERRED_BATCH_SIZES: Final = (4, 8, 16, 32)
"""Batch sizes at which a batch leaves the queue at once, in addition to the maximum."""

QUEUE_DELAY_US: Final = 200
"""Longest time that a request waits for others: at most what the smallest network takes for one image on a CPU."""

# ONNX Runtime uses TF32 by default, but the parity check ran in fp32. Options of triton-inference-server's
# onnxruntime_backend.
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
    """Return the `config.pbtxt` of a model in a folder called `name`.

    The maximum batch size is the largest that passed the parity check. Triton chooses where to run: one instance on
    each GPU, or on the CPU if there is no GPU. Clients can read the spec, with the preprocessing and the class names,
    from the parameter `cifarx.spec` at `GET /v2/models/{name}/config`.
    """
    largest = max(spec.parity.batch_sizes) if spec.parity else EVAL_BATCH_SIZE
    preferred = [*(size for size in PREFERRED_BATCH_SIZES if size < largest), largest]
    data_type, dims = ("TYPE_FP32", list(spec.input.shape))
    if spec.embedded_preprocessing:
        data_type, dims = ("TYPE_UINT8", [-1, -1, spec.input.channels])
    return f"""\
name: {quote(name)}
backend: "onnxruntime"
platform: "onnxruntime_onnx"
default_model_filename: "model.onnx"
max_batch_size: {largest}
input [ {{ name: "input" data_type: {data_type} dims: {dims} }} ]
output [
  {{
    name: "{spec.output}"
    data_type: TYPE_FP32
    dims: [{spec.output_size}]
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
  value: {{ string_value: {quote(spec.to_json())} }}
}}
"""


def labels(spec: ModelSpec) -> str:
    """Return the name of each output, one per line. Triton cannot represent a line break in a name.

    These are the class names in label order. The only output for two classes has the name of the second class, whose
    score it is.
    """
    return "".join(" ".join(name.splitlines()) + "\n" for name in spec.class_names[-spec.output_size :])


def quote(text: str) -> str:
    """Return a string literal of Protocol Buffers' text format. Bytes of its UTF-8 that are not printable are octal."""
    return '"' + "".join(_escape(byte) for byte in text.encode()) + '"'


def _escape(byte: int) -> str:
    if byte in b'"\\':
        return "\\" + chr(byte)
    return chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}"
