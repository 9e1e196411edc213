"""The OpenAPI document, generated from the routes and their message structs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from cifarx_serve.server.api.open_inference_schemas import Byte, BytesInput, Fp32Input, Nested, Uint8Input
from cifarx_serve.server.asgi import Body, Operation, Parameter, Route
from cifarx_serve.server.http.response import ErrorResponse
from cifarx_serve.system.versions import package_version

JSON_TYPE: Final = "application/json"
BINARY_TYPE: Final = "application/octet-stream"
BINARY: Final = {"type": "string", "format": "binary"}

MODEL_NOT_FOUND: Final = {HTTPStatus.NOT_FOUND: "The model or the version does not exist"}
BODY_ERRORS: Final = {
    HTTPStatus.REQUEST_TIMEOUT: "The body was not received in time",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body, the number of pixels or the number of images is over the limit",
    HTTPStatus.SERVICE_UNAVAILABLE: "The queue is full or the model is not ready; Retry-After says when to try again",
    HTTPStatus.GATEWAY_TIMEOUT: "The request was not answered before its deadline",
}
"""The errors of every operation that runs a model."""

_VERSION: Final = "3.1.0"
_REF: Final = "#/components/schemas/{name}"
_API_KEY_REQUIRED: Final = {HTTPStatus.UNAUTHORIZED: "The API key is missing or invalid"}
_SECURITY_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_DESCRIPTION: Final = "Image classifiers over HTTP. Errors are JSON that says what is wrong and how to fix it."


def ok_response(description: str, schema: type[msgspec.Struct]) -> dict[HTTPStatus, Body]:
    """Return the entry of `Operation.responses` for status 200 with a JSON body."""
    return {HTTPStatus.OK: Body(description, {JSON_TYPE: schema})}


def error_responses(*descriptions: Mapping[HTTPStatus, str]) -> dict[HTTPStatus, Body]:
    """Return the entries of `Operation.responses` for error statuses."""
    return {
        status: Body(description, {JSON_TYPE: ErrorResponse})
        for errors in descriptions
        for status, description in errors.items()
    }


def reference(schema: type) -> dict[str, str]:
    """Return a JSON Schema that refers to that of a message struct."""
    return {"$ref": _REF.format(name=schema.__name__)}


def openapi_document(routes: Sequence[Route], root_path: str = "") -> bytes:
    """Return the OpenAPI document of the routes that have an operation, as JSON; their paths follow the root path."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[Any, None] = {}  # an ordered set
    for route in routes:
        if route.operation is None:
            continue
        responses = dict(route.operation.responses)
        if not route.public:
            responses |= error_responses(_API_KEY_REQUIRED)
        in_path = [parameter for parameter in route.operation.parameters if parameter.location == "path"]
        path = paths.setdefault(route.path, {"parameters": [_parameter(parameter) for parameter in in_path]})
        path[route.method.lower()] = _operation(route.operation, responses, route.public)
        schemas |= dict.fromkeys(_schemas(route.operation, responses))
    document = {
        "openapi": _VERSION,
        "info": {"title": "cifarx serve", "version": package_version(), "description": _DESCRIPTION},
        **({"servers": [{"url": root_path}]} if root_path else {}),
        "paths": paths,
        "components": {"schemas": _components(schemas), "securitySchemes": _SECURITY_SCHEMES},
    }
    return msgspec.json.encode(document)


def _operation(operation: Operation, responses: Mapping[HTTPStatus, Body], public: bool) -> dict[str, Any]:
    others = [parameter for parameter in operation.parameters if parameter.location != "path"]
    described: dict[str, Any] = {"operationId": operation.id, "summary": operation.summary}
    if operation.description:
        described["description"] = operation.description
    if others:
        described["parameters"] = [_parameter(parameter) for parameter in others]
    if operation.request:
        described["requestBody"] = {"required": True, **_body(operation.request)}
    described["responses"] = {str(int(status)): _body(responses[status]) for status in sorted(responses)}
    if not public:
        described["security"] = [{}, *({scheme: []} for scheme in _SECURITY_SCHEMES)]
    return described


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.location,
        "required": parameter.location == "path",
        "schema": parameter.schema,
        "description": parameter.description,
    }


def _body(body: Body) -> dict[str, Any]:
    content = {
        media_type: {"schema": reference(schema) if isinstance(schema, type) else schema}
        for media_type, schema in body.content.items()
    }
    return {"description": body.description, "content": content}


def _schemas(operation: Operation, responses: Mapping[HTTPStatus, Body]) -> Iterator[type]:
    """Yield the message structs of an operation."""
    for body in (operation.request, *responses.values()):
        if body:
            yield from (schema for schema in body.content.values() if isinstance(schema, type))


def _components(schemas: Iterable[type]) -> dict[str, Any]:
    """Return the JSON Schemas of message structs and of the structs in their fields, by name."""
    _, components = msgspec.json.schema_components(schemas, ref_template=_REF)
    # What the structs cannot declare: a field has no union of two list types, and the decoder accepts sizes of 0, which
    # are refused later with a clearer error message.
    for schema, nested in ((Fp32Input, Nested[float]), (Uint8Input, Nested[Byte]), (BytesInput, list[list[str]])):
        properties = components[schema.__name__]["properties"]
        properties["data"] = {
            "description": "The elements in row-major order, flat or nested like the shape.",
            "anyOf": [properties["data"], msgspec.json.schema(nested)],
        }
        properties["shape"]["items"]["minimum"] = 1
    return components
