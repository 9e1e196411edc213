"""The OpenAPI document against the OpenAPI standard, the routes and the responses of the server."""

import asyncio
import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from jsonschema import Draft202012Validator
from PIL import Image
from schemathesis.core.result import Ok

from cifarx_serve.server.api.openapi import openapi_document
from cifarx_serve.server.api.routes import create_routes
from cifarx_serve.server.asgi import Route
from cifarx_serve.server.inference.deadline import ThreadPool
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model_control import ModelControl
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.settings import Settings
from tests.support.asgi_client import AsgiClient, encode_image, open_client, run_with_client
from tests.support.color_model import write_onnx
from tests.support.spec_model import make_spec, write_model

PAGES = {"/", "/docs", "/openapi.json"}


@pytest.fixture(scope="module")
def routes() -> list[Route]:
    metrics = Metrics()
    with closing(ImageDecoder(1, 1)) as decoder, closing(ThreadPool(1, "parse")) as threads:
        repository = ModelRepository(Settings(files={}), metrics)
        return create_routes(repository, metrics, decoder, threads, ModelControl(repository))


@pytest.fixture(scope="module")
def document(routes: list[Route]) -> dict[str, Any]:
    document = json.loads(openapi_document(routes))
    assert isinstance(document, dict)
    return document


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }


def is_public(routes: list[Route]) -> dict[tuple[str, str], bool]:
    return {(route.method, route.path): route.public for route in routes if route.path not in PAGES}


def test_only_pages_have_no_documentation(routes: list[Route]) -> None:
    assert {route.path for route in routes if route.operation is None} == PAGES


def test_it_has_every_route_and_no_other(document: dict[str, Any], routes: list[Route]) -> None:
    assert operations(document).keys() == is_public(routes).keys()


def test_the_document_states_which_operations_require_an_api_key(document: dict[str, Any], routes: list[Route]) -> None:
    documented = operations(document)
    assert {key: "security" not in operation for key, operation in documented.items()} == is_public(routes)
    assert all(("401" in operation["responses"]) == ("security" in operation) for operation in documented.values())


def test_it_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    loaded = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert {(operation.method.upper(), operation.path) for operation in loaded} == operations(document).keys()


def test_every_reference_has_a_valid_schema(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= schemas.keys()
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(ids)) == len(ids)


def test_every_path_parameter_is_described(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        described = {entry["name"] for entry in item.get("parameters", []) if entry["in"] == "path"}
        assert described == set(re.findall(r"\{(\w+)\}", path))


def test_an_inference_request_may_have_flat_nested_or_binary_data(document: dict[str, Any]) -> None:
    reference = {"$ref": "#/components/schemas/InferenceRequest"}
    request = Draft202012Validator({**reference, "components": document["components"]})
    tensor = {"name": "input", "shape": [1, 1, 2, 3], "datatype": "UINT8"}
    for entry in ({"data": [0] * 6}, {"data": [[[[0] * 3] * 2]]}, {"parameters": {"binary_data_size": 6}}):
        request.validate({"inputs": [tensor | entry]})
    for inputs in (
        [],
        [tensor, tensor],
        [tensor | {"name": "image"}],
        [tensor | {"shape": [0, 1, 2, 3]}],
        [tensor | {"shape": [1, 2, 3]}],
        [tensor | {"datatype": "FP64"}],
        [tensor | {"data": [[0] * 6]}],
        [tensor | {"data": [256] * 6}],
    ):
        assert not request.is_valid({"inputs": inputs})


def test_responses_match_their_schemas(document: dict[str, Any], tmp_path: Path) -> None:
    image = encode_image(Image.new("RGB", (9, 5)))
    infer = {"inputs": [{"name": "input", "shape": [1, 4, 6, 3], "datatype": "UINT8", "data": [0] * 72}]}
    requests = [
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
        async with open_client({"m": write_onnx(tmp_path / "m.onnx")}) as client:
            for method, path, target, body in requests:
                response = await client.request(method, target, body)
                described = operations(document)[method, path]["responses"][str(response.status)]
                schema = described["content"]["application/json"]["schema"]
                Draft202012Validator({**schema, "components": document["components"]}).validate(response.json)
            served = await client.get("/openapi.json")
            assert served.json == document

    asyncio.run(run())


def test_responses_of_a_model_with_several_labels_match_their_schemas(document: dict[str, Any], tmp_path: Path) -> None:
    spec = make_spec(activation="sigmoid", output="probabilities", assumed=("output",))
    infer = {"inputs": [{"name": "input", "shape": [1, 4, 6, 3], "datatype": "UINT8", "data": [0] * 72}]}
    requests = [
        ("POST", "/v1/predict", "/v1/predict", encode_image(Image.new("RGB", (9, 5)))),
        ("GET", "/v1/models", "/v1/models", b""),
        ("GET", "/v2/models/{model}", "/v2/models/m", b""),
        ("POST", "/v2/models/{model}/infer", "/v2/models/m/infer", json.dumps(infer).encode()),
    ]

    async def run() -> None:
        async with open_client({"m": write_model(tmp_path / "m.onnx", spec)}) as client:
            for method, path, target, body in requests:
                response = await client.request(method, target, body)
                described = operations(document)[method, path]["responses"]["200"]
                schema = described["content"]["application/json"]["schema"]
                Draft202012Validator({**schema, "components": document["components"]}).validate(response.json)

    asyncio.run(run())


def test_a_server_that_is_not_ready_responds_as_described(document: dict[str, Any], tmp_path: Path) -> None:
    async def run() -> None:
        async with open_client({"m": write_onnx(tmp_path / "m.onnx")}, open_models=False) as client:
            for path, target in [
                ("/readyz", "/readyz"),
                ("/v2/health/ready", "/v2/health/ready"),
                ("/v2/models/{model}/ready", "/v2/models/m/ready"),
            ]:
                response = await client.get(target)
                assert response.status == 503
                described = operations(document)["GET", path]["responses"]["503"]
                schema = described["content"]["application/json"]["schema"]
                Draft202012Validator({**schema, "components": document["components"]}).validate(response.json)

    asyncio.run(run())


def test_the_paths_follow_the_root_path_of_the_server_or_of_the_proxy() -> None:
    async def test(client: AsgiClient) -> None:
        document = (await client.get("/models/openapi.json")).json
        assert document["servers"] == [{"url": "/models"}]
        assert "/v1/predict" in document["paths"]
        document = (await client.get("/openapi.json", x_forwarded_prefix="/edge/models")).json
        assert document["servers"] == [{"url": "/edge/models"}]

    run_with_client(test, root_path="/models", trusted_proxies=("127.0.0.1",), open_models=False)
