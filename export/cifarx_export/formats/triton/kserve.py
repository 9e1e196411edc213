"""A KServe `InferenceService` for a Triton model repository."""

import re
from typing import Final

from cifarx_serve.spec import ModelSpec

LONGEST_NAME: Final = 40
"""Of 63 characters that a host's label may have, some are the cluster's: `-predictor`, the name space."""

_GIB: Final = 1 << 30


def kserve_manifest(spec: ModelSpec, model_bytes: int) -> str:
    """YAML for `kubectl apply`, once the user has put the address of the uploaded folder into it.

    See https://kserve.github.io/website, "Triton Inference Server". The runtime `kserve-tritonserver` comes with
    KServe and starts `tritonserver --model-store` on what it finds at `storageUri`.
    """
    name = resource_name(spec.model)
    # The server itself, and the model three times over: the file as read, its weights, and their packed copies.
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
      storageUri: "s3://CHANGE-ME/{name}.triton"
      # For a GPU add `nvidia.com/gpu: "1"` to both.
      resources:
        requests:
          cpu: "1"
          memory: {memory}
        limits:
          cpu: "1"
          memory: {memory}
"""


def resource_name(model: str) -> str:
    """A model's name as KServe takes one: RFC 1123's letters, digits and hyphens, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower())
    name = re.sub(r"^[^a-z]+", "", name)[:LONGEST_NAME].rstrip("-")
    return name or "model"
