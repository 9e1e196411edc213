"""The document against the standard's own schema, and against the routes."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from jsonschema import Draft202012Validator
from PIL import Image

from cifarx_serve.server.api.openapi import openapi_document
from cifarx_serve.server.api.routes import Routes
from tests.support.asked import application, encoded
from tests.support.color_model import write_onnx

PAGES = {"/", "/docs", "/openapi.json"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found = json.loads(openapi_document())
    assert isinstance(found, dict)
    return found


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }


def routes() -> dict[tuple[str, str], bool]:
    """Whether each is open."""
    table = Routes(None, None, None).table()  # type: ignore[arg-type]
    return {(route.method, route.template): route.open for route in table if route.template not in PAGES}


def test_every_route_is_in_it_and_no_other(document: dict[str, Any]) -> None:
    assert operations(document).keys() == routes().keys()


def test_it_says_which_need_a_key(document: dict[str, Any]) -> None:
    found = operations(document)
    assert {key: "security" not in operation for key, operation in found.items()} == routes()
    assert all(("401" in operation["responses"]) == ("security" in operation) for operation in found.values())


def test_it_is_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    assert found == operations(document).keys()


def test_every_reference_has_a_schema_and_every_schema_is_one(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= schemas.keys()
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


def test_operations_have_names_of_their_own(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)


def test_every_part_of_a_path_is_described(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        described = {entry["name"] for entry in item.get("parameters", []) if entry["in"] == "path"}
        assert described == set(re.findall(r"\{(\w+)\}", path))


def test_answers_are_as_it_says(document: dict[str, Any], tmp_path: Path) -> None:
    """Good ones and errors."""
    image = encoded(Image.new("RGB", (9, 5)))
    infer = {"inputs": [{"name": "input", "shape": [1, 4, 6, 3], "datatype": "UINT8", "data": [0] * 72}]}
    asked = [
        ("POST", "/v1/predict", "/v1/predict?top_k=2", image),
        ("POST", "/v1/predict", "/v1/predict", b"no image"),
        ("POST", "/v1/predict", "/v1/predict?model=x", image),
        ("GET", "/v1/models", "/v1/models", b""),
        ("GET", "/healthz", "/healthz", b""),
        ("GET", "/readyz", "/readyz", b""),
        ("GET", "/v2", "/v2", b""),
        ("GET", "/v2/health/live", "/v2/health/live", b""),
        ("GET", "/v2/health/ready", "/v2/health/ready", b""),
        ("GET", "/v2/models/{model}", "/v2/models/m", b""),
        ("GET", "/v2/models/{model}", "/v2/models/x", b""),
        ("GET", "/v2/models/{model}/ready", "/v2/models/m/ready", b""),
        ("POST", "/v2/models/{model}/infer", "/v2/models/m/infer", json.dumps(infer).encode()),
        ("POST", "/v2/models/{model}/infer", "/v2/models/m/infer", b"{}"),
        ("GET", "/v2/models/{model}/versions/{version}", "/v2/models/m/versions/1", b""),
    ]

    async def run() -> None:
        async with application({"m": write_onnx(tmp_path / "m.onnx")}) as client:
            for method, template, target, body in asked:
                answer = await client.ask(method, target, body)
                described = operations(document)[method, template]["responses"][str(answer.status)]
                schema = described["content"]["application/json"]["schema"]
                Draft202012Validator({**schema, "components": document["components"]}).validate(answer.json)
            served = await client.get("/openapi.json")
            assert served.json == document

    asyncio.run(run())
