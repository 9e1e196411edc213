"""The OpenAPI document: what the routes take and answer, for people, generators and fuzzers."""

from functools import cache
from typing import Any, Final

import msgspec

from cifarx_serve.server.api.open_inference import INPUT, ModelMetadata, ServerMetadata
from cifarx_serve.server.api.schemas import ErrorAnswer, ModelsAnswer, PredictAnswer, StateAnswer
from cifarx_serve.server.http.multipart import FIELDS, FORM
from cifarx_serve.system.versions import package_version

_VERSION: Final = "3.1.0"
_REF: Final = "#/components/schemas/{name}"

_NO_IMAGE: Final = {"400": "Broken image, or a field that means nothing", "415": "No image by its content type"}
_REFUSED: Final = {
    "401": "No API key, or a wrong one",
    "408": "The body did not come in time",
    "413": "Body, pixels or images over the limit",
    "503": "Queue full, or the model is not ready; Retry-After says when to try again",
    "504": "No answer within the deadline",
}
_ABSENT: Final = {"404": "No such model or version"}

_INFERENCE_REQUEST: Final = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object", "properties": {"binary_data_output": {"type": "boolean"}}},
        "inputs": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"const": INPUT},
                    "datatype": {"enum": ["FP32", "UINT8"]},
                    "shape": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 1},
                        "minItems": 4,
                        "maxItems": 4,
                        "description": "FP32: [N, 3, height, width], as the network takes it. UINT8: [N, height, "
                        "width, 3], RGB pixels, which the server scales.",
                    },
                    "data": {"type": "array", "description": "The numbers, flat or nested, row by row."},
                    "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
                },
            },
        },
        "outputs": {"type": "array", "items": {"type": "object", "properties": {"name": {"const": "logits"}}}},
    },
}
_INFERENCE_RESPONSE: Final = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "id": {"type": "string"},
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"const": "logits"},
                    "datatype": {"const": "FP32"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "data": {"type": "array", "items": {"type": ["number", "null"]}},
                },
            },
        },
    },
}


@cache
def openapi_document() -> bytes:
    """The document, as JSON."""
    document = {
        "openapi": _VERSION,
        "info": {
            "title": "cifarx serve",
            "version": package_version(),
            "description": "Image classifiers over HTTP. Errors are JSON: what was wrong, and how to mend it.",
        },
        "paths": {**_own_paths(), **_protocol_paths(), **_other_paths()},
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }
    return msgspec.json.encode(document)


def _schemas() -> dict[str, Any]:
    types = (PredictAnswer, ModelsAnswer, StateAnswer, ErrorAnswer, ServerMetadata, ModelMetadata)
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    return {**schemas, "InferenceRequest": _INFERENCE_REQUEST, "InferenceResponse": _INFERENCE_RESPONSE}


def _own_paths() -> dict[str, Any]:
    image = {"type": "string", "format": "binary"}
    images = {"type": "array", "items": image}
    form = {"type": "object", "properties": dict.fromkeys(FIELDS, images), "minProperties": 1}
    query = [
        _parameter("model", "query", {"type": "string"}, "The model's name; the first where it is not given."),
        _parameter("top_k", "query", {"type": "integer", "minimum": 1}, "Classes to give; at most 5 by default."),
    ]
    binary = {"schema": image}
    body = {
        "required": True,
        "content": {"image/*": binary, "application/octet-stream": binary, FORM: {"schema": form}},
    }
    errors = {**_NO_IMAGE, **_ABSENT, **_REFUSED}
    return {
        "/v1/predict": {
            "post": {
                **_operation(
                    "predict",
                    "Classify one image or several",
                    "The best classes of each image",
                    "PredictAnswer",
                    errors,
                    secured=True,
                ),
                "parameters": query,
                "requestBody": body,
            }
        },
        "/v1/models": {
            "get": _operation(
                "models",
                "The models, their specs and proofs",
                "In the order of the files",
                "ModelsAnswer",
                {},
                secured=True,
            )
        },
    }


def _protocol_paths() -> dict[str, Any]:
    length = _parameter(
        "Inference-Header-Content-Length",
        "header",
        {"type": "integer", "minimum": 1},
        "Bytes of the JSON before binary tensors.",
    )
    binary = {"schema": {"type": "string", "format": "binary", "description": "The JSON, then the tensor's bytes."}}
    content = {"application/json": {"schema": _ref("InferenceRequest")}, "application/octet-stream": binary}
    errors = {"400": "No such tensor, or not of this shape or type", **_ABSENT, **_REFUSED}
    paths: dict[str, Any] = {
        "/v2": {
            "get": _operation(
                "server_metadata",
                "Open Inference Protocol: the server",
                "Its name, version and extensions",
                "ServerMetadata",
                {},
            )
        },
        "/v2/health/live": {"get": _operation("live", "Whether the server runs", "It does", None, {})},
        "/v2/health/ready": {
            "get": _operation("ready", "Whether it can answer", "It can", None, {"503": "Not yet, or no more"})
        },
    }
    for version in ("", "/versions/{version}"):
        model, suffix = f"/v2/models/{{model}}{version}", "_of_version" if version else ""
        names = [
            _parameter(name, "path", {"type": "string"}, f"The {name}.")
            for name in ("model", "version")
            if f"{{{name}}}" in model
        ]
        metadata = _operation(
            f"model_metadata{suffix}",
            "A model's tensors",
            "Their names, types and shapes",
            "ModelMetadata",
            _ABSENT,
            secured=True,
        )
        not_ready = {**_ABSENT, "503": "Not yet, or no more"}
        ready = _operation(
            f"model_ready{suffix}", "Whether a model can answer", "It can", None, not_ready, secured=True
        )
        infer = _operation(
            f"infer{suffix}",
            "The logits of a batch",
            "As JSON, or after the JSON",
            "InferenceResponse",
            errors,
            secured=True,
        )
        infer["responses"]["200"]["content"]["application/octet-stream"] = binary
        body = {"required": True, "content": content}
        paths[model] = {"get": metadata, "parameters": names}
        paths[f"{model}/ready"] = {"get": ready, "parameters": names}
        paths[f"{model}/infer"] = {"post": {**infer, "requestBody": body}, "parameters": [*names, length]}
    return paths


def _other_paths() -> dict[str, Any]:
    return {
        "/healthz": {"get": _operation("healthz", "Whether the process is alive", "It is", "StateAnswer", {})},
        "/readyz": {
            "get": _operation(
                "readyz", "Whether it can answer: for load balancers", "It can", "StateAnswer", {"503": "Not now"}
            )
        },
        "/metrics": {
            "get": {
                **_operation("metrics", "Figures of every worker, for Prometheus", "As text", None, {}, secured=True),
                "responses": {
                    "200": {"description": "Prometheus's text format", "content": {"text/plain": {}}},
                    "401": {"description": _REFUSED["401"]},
                },
            }
        },
    }


def _operation(
    name: str, summary: str, found: str, answer: str | None, errors: dict[str, str], secured: bool = False
) -> dict[str, Any]:
    """`found` says what a 200 means; `secured`: where keys are asked for, this asks for one."""
    errors = {**({"401": _REFUSED["401"]} if secured else {}), **errors}
    good: dict[str, Any] = {"description": found}
    good["content"] = {"application/json": {"schema": _ref(answer) if answer else {"type": "object"}}}
    wrong = {"application/json": {"schema": {"type": "object"} if "ready" in name else _ref("ErrorAnswer")}}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": good,
            **{status: {"description": text, "content": wrong} for status, text in errors.items()},
        },
        **({"security": [{}, {"bearer": []}, {"header": []}]} if secured else {}),
    }


def _parameter(name: str, place: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "schema": schema,
        "description": description,
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}
