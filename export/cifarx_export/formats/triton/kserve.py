"""The manifest of a KServe `InferenceService` for a Triton model repository."""

import re
from typing import Final

from cifarx_export.formats.registry import FORMATS
from cifarx_serve.spec import ModelSpec

MAX_NAME_LENGTH: Final = 40
"""A label of a host name has at most 63 characters, and KServe appends `-predictor` and the namespace."""

_GIB: Final = 1 << 30


def kserve_manifest(spec: ModelSpec, model_bytes: int) -> str:
    """Return the YAML for `kubectl apply`. The user has to replace `storageUri` by the URI of the uploaded folder.

    See https://kserve.github.io/website, "Triton Inference Server". The runtime `kserve-tritonserver` comes with
    KServe and starts `tritonserver --model-store` on the contents of `storageUri`.

    Args:
        spec: spec of the model.
        model_bytes: size of the ONNX file, which determines the memory request.
    """
    name = kubernetes_name(spec.model)
    # For the server itself, and three copies of the model: the file in memory, the weights, and the packed weights.
    memory = f"{2 + 3 * model_bytes // _GIB}Gi"
    return f"""\
# CHANGE storageUri BEFORE USE: it is a placeholder. Upload the folder that this file lies in, and name the place
# (s3://, gs://, pvc://, https:// ...). Then: kubectl apply -f kserve.yaml
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
        version: "2"
      runtime: kserve-tritonserver
      protocolVersion: v2
      storageUri: "s3://CHANGE-ME/{name}{FORMATS["triton"].suffix}"
      # For a GPU add `nvidia.com/gpu: "1"` to both.
      resources:
        requests:
          cpu: "1"
          memory: {memory}
        limits:
          cpu: "1"
          memory: {memory}
"""


def kubernetes_name(model: str) -> str:
    """Return the name of a model as a Kubernetes name (RFC 1123): a letter, then letters, digits and hyphens."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower())
    name = re.sub(r"^[^a-z]+", "", name)[:MAX_NAME_LENGTH].rstrip("-")
    return name or "model"
