"""Health checks, metrics, pages, and API keys."""

from pathlib import Path

import pytest
from PIL import Image
from urllib3.filepost import encode_multipart_formdata

from tests.support.asgi_client import AsgiClient, encode_image, run_with_client

RED = Image.new("RGB", (9, 5), "red")


def test_health(color_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        for path, healthy in [
            ("/healthz", {"status": "alive"}),
            ("/readyz", {"status": "ready"}),
            ("/v2/health/live", {"live": True}),
            ("/v2/health/ready", {"ready": True}),
        ]:
            response = await client.get(path)
            assert (response.status, response.json) == (200, healthy)
        client.repository.draining = True
        assert (await client.get("/readyz")).json == {"status": "draining"}
        assert (await client.get("/v2/models/colors/ready")).status == 503
        assert (await client.get("/healthz")).status == 200

    run_with_client(test, color_model)


def test_responses_while_models_are_loading(color_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get("/readyz")
        assert (response.status, response.json) == (503, {"status": "starting"})
        assert (await client.get("/healthz")).status == 200
        assert (await client.get("/v1/models")).json == {"models": []}
        for response in (await client.post("/v1/predict", encode_image(RED)), await client.get("/v2/models/colors")):
            assert (response.status, response.headers["retry-after"]) == (503, "1")

    run_with_client(test, color_model, open_models=False)


def test_metrics_are_in_prometheus_text_format(color_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        form = encode_multipart_formdata([("image", (name, encode_image(RED))) for name in ("a", "b")])
        await client.post("/v1/predict", *form)
        await client.post("/v1/predict", b"no image")
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        page = response.body.decode()
        assert 'cifarx_requests_total{route="/v1/predict",status="200"} 1.0' in page
        assert 'cifarx_requests_total{route="/v1/predict",status="400"} 1.0' in page
        assert 'cifarx_errors_total{cause="bad_request"} 1.0' in page
        assert 'cifarx_batch_images_sum{model="colors"} 2.0' in page

    run_with_client(test, color_model)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_other_origins(color_model: Path, path: str) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.get(path)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert response.body.lower().startswith(b"<!doctype html>")
        assert response.headers["content-security-policy"] == (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob: data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    run_with_client(test, color_model)


def test_routes_that_require_an_api_key(color_model: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("secret")
    protected = [
        "/v1/models",
        "/metrics",
        "/v2/models/colors",
        "/v2/models/colors/ready",
        "/v2/models/colors/versions/1",
    ]
    public = ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready"]

    async def test(client: AsgiClient) -> None:
        assert [(await client.get(path)).status for path in protected] == [401] * len(protected)
        assert [(await client.get(path)).status for path in public] == [200] * len(public)
        assert (await client.post("/v1/predict", encode_image(RED))).status == 401
        assert (await client.post("/v2/models/colors/infer", b"{}")).status == 401
        headers = {"x-api-key": "secret"}
        assert (await client.request("POST", "/v1/predict", encode_image(RED), headers)).status == 200

    run_with_client(test, color_model, api_key_file=key_file)
