"""The server's own interface and the Open Inference Protocol, asked by ASGI."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from urllib3.filepost import encode_multipart_formdata

from cifarx_serve.predictor import load
from cifarx_serve.server.settings import Limits
from cifarx_serve.spec import ModelSpec
from tests.support.asked import Answer, Client, application, encoded
from tests.support.color_model import SPEC, write_onnx
from tests.support.planted_backend import POISON, plant, write_planted
from tests.support.trained_model import Trained

RED, GREEN, BLUE = (Image.new("RGB", (9, 5), colour) for colour in ("red", "lime", "blue"))


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colours.onnx")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plant(monkeypatch)
    return write_planted(tmp_path / "planted.planted")


def ask(test: Callable[[Client], Awaitable[None]], *paths: Path, **options: Any) -> None:
    limits = {name: options.pop(name) for name in list(options) if name in Limits.__struct_fields__}

    async def run() -> None:
        files = {path.stem: path for path in paths}
        async with application(files, Limits(**{"max_batch": 4, **limits}), **options) as client:
            await test(client)

    asyncio.run(run())


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


async def post_form(client: Client, files: list[tuple[str, bytes]], target: str = "/v1/predict") -> Answer:
    body, kind = encode_multipart_formdata([("image", file) for file in files])
    return await client.post(target, body, kind)


def expected(path: Path, image: bytes, top_k: int) -> dict[str, Any]:
    with load(path, device="cpu") as predictor:
        found: dict[str, Any] = msgspec.to_builtins(predictor.predict(image, top_k))
    return found | {"top": list(found["top"])}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    scores = [candidate["score"] for candidate in found["top"]]
    assert scores == pytest.approx([candidate["score"] for candidate in wanted["top"]], abs=1e-6)
    assert found["score"] == scores[0]
    return [(entry["label"], entry["index"]) for entry in [found, *found["top"]]] == [
        (entry["label"], entry["index"]) for entry in [wanted, *wanted["top"]]
    ]


# /v1/predict


def test_predictions_are_those_of_the_predictor(trained: Trained) -> None:
    """For each format, as a body and in a form."""
    files = {kind: encoded(noise(), kind) for kind in ("PNG", "JPEG", "WEBP")}
    files["large"] = encoded(noise(400, 300))

    async def test(client: Client) -> None:
        for data in files.values():
            answer = (await client.post("/v1/predict", data, "image/png")).json
            assert answer["model"] == trained.onnx.stem
            [prediction] = answer["predictions"]
            assert prediction["image"] is None
            assert same(prediction, expected(trained.onnx, data, 5))
        form = (await post_form(client, list(files.items()))).json
        assert [prediction["image"] for prediction in form["predictions"]] == list(files)
        for prediction, data in zip(form["predictions"], files.values(), strict=True):
            assert same(prediction, expected(trained.onnx, data, 5))

    ask(test, trained.onnx)


def test_predictions_of_a_photograph(trained: Trained, dog: Path) -> None:
    async def test(client: Client) -> None:
        answer = (await client.post("/v1/predict", dog.read_bytes())).json
        assert same(answer["predictions"][0], expected(trained.onnx, dog.read_bytes(), 5))

    ask(test, trained.onnx)


def test_a_file_that_resizes_gets_the_pictures_as_they_are(planted: Path) -> None:
    write_planted(planted, embedded=True)
    files = [(f"{number}.png", encoded(image)) for number, image in enumerate([RED, noise(), BLUE, GREEN, noise(7, 3)])]

    async def test(client: Client) -> None:
        answer = (await post_form(client, files, "/v1/predict?top_k=3")).json
        for prediction, (name, data) in zip(answer["predictions"], files, strict=True):
            assert prediction["image"] == name
            assert same(prediction, expected(planted, data, 3))

    ask(test, planted)


@pytest.mark.slow
def test_predictions_of_an_exported_file_that_resizes(trained: Trained, tmp_path: Path) -> None:
    from cifarx_export.export import export
    from cifarx_export.formats.registry import ExportOptions

    options = ExportOptions(embed_preprocessing=True)
    [made] = export(trained.checkpoint, ["onnx"], data="builtin", out=tmp_path, options=options)
    files = [("a.png", encoded(noise())), ("b.jpg", encoded(noise(64, 48), "JPEG"))]

    async def test(client: Client) -> None:
        answer = (await post_form(client, files)).json
        for prediction, (_, data) in zip(answer["predictions"], files, strict=True):
            assert same(prediction, expected(made.path, data, 5))

    ask(test, made.path)


def test_the_answer_says_what_answered_and_where_its_time_went(colours: Path) -> None:
    async def test(client: Client) -> None:
        answer = await client.post("/v1/predict", encoded(RED))
        found = answer.json
        assert list(found) == ["model", "version", "predictions", "timing_us"]
        assert found["version"] == client.service.serving(None).model.version
        timing = found["timing_us"]
        assert list(timing) == ["decode", "queue", "compute", "total"]
        assert all(isinstance(spent, int) and spent >= 0 for spent in timing.values())
        assert timing["total"] >= timing["decode"] + timing["compute"]

    ask(test, colours)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_so_many_classes_as_are_asked_for(colours: Path, top_k: int) -> None:
    async def test(client: Client) -> None:
        [prediction] = (await client.post(f"/v1/predict?top_k={top_k}", encoded(GREEN))).json["predictions"]
        assert same(prediction, expected(colours, encoded(GREEN), top_k))
        assert len(prediction["top"]) == top_k

    ask(test, colours)


@pytest.mark.parametrize("top_k", ["0", "4", "-1", "1.0", "", "x", "1e0", "\u0661", "9" * 7])
def test_a_number_of_classes_that_means_nothing(colours: Path, top_k: str) -> None:
    async def test(client: Client) -> None:
        answer = await client.post(f"/v1/predict?top_k={top_k}", encoded(GREEN))
        assert answer.status == 400
        assert answer.error.startswith("top_k is ")
        assert answer.error.endswith("give a number from 1 to 3")

    ask(test, colours)


def test_a_model_is_chosen_by_its_name(colours: Path, tmp_path: Path) -> None:
    other = write_onnx(tmp_path / "turned.onnx", order=(2, 1, 0))

    async def test(client: Client) -> None:
        for query, label in [("", "red"), ("?model=colours", "red"), ("?model=turned&top_k=1", "blue")]:
            answer = (await client.post(f"/v1/predict{query}", encoded(RED))).json
            assert answer["predictions"][0]["label"] == label
        absent = await client.post("/v1/predict?model=colour", encoded(RED))
        assert absent.status == 404
        assert "did you mean 'colours'?" in absent.error

    ask(test, colours, other)


def test_what_is_wrong_with_one_image_does_not_stop_the_others(colours: Path) -> None:
    files = [
        ("red", encoded(RED)),
        ("text", b"no image"),
        ("cut", encoded(noise())[:200]),
        ("large", encoded(noise(101, 100))),
        ("blue", encoded(BLUE)),
    ]

    async def test(client: Client) -> None:
        answer = await post_form(client, files)
        assert answer.status == 200
        found = answer.json["predictions"]
        assert [entry["image"] for entry in found] == [name for name, _ in files]
        assert [entry.get("label") for entry in found] == ["red", None, None, None, "blue"]
        assert list(found[1]) == ["image", "error"]
        assert found[1]["error"].startswith("8 bytes is not an image: ")
        assert "truncated or damaged" in found[2]["error"]
        assert "101x100 pixels, over the limit of 10,000 pixels" in found[3]["error"]

    ask(test, colours, max_pixels=10_000)


def test_where_every_image_is_broken_the_first_says_what_is_wrong(colours: Path) -> None:
    large, text = ("large", encoded(noise(101, 100))), ("text", b"no image")

    async def test(client: Client) -> None:
        for files, status in [([text, large], 400), ([large, text], 413)]:
            answer = await post_form(client, files)
            assert (answer.status, "error" in answer.json) == (status, True)

    ask(test, colours, max_pixels=10_000)


def test_pictures_that_the_model_resizes_are_limited_together(planted: Path) -> None:
    """All of them are in memory at a time."""
    write_planted(planted, embedded=True)
    files = [(name, encoded(noise(60, 50))) for name in "abc"] + [("d", encoded(RED))]

    async def test(client: Client) -> None:
        found = (await post_form(client, files)).json["predictions"]
        assert ["error" in entry for entry in found] == [False, False, True, False]

    ask(test, planted, max_pixels=6100)


@pytest.mark.parametrize(
    ("target", "body", "kind", "status", "problem"),
    [
        ("", b"no image", "image/png", 400, "8 bytes is not an image"),
        ("", b"", "image/png", 400, "the body is empty"),
        ("", b"no form", "multipart/form-data; boundary=X", 400, "a damaged form"),
        ("", b"", "multipart/form-data", 400, "a form"),
        ("", b"{}", "application/json", 415, "a body of type 'application/json'"),
        ("?topk=1", b"", None, 400, "unknown field 'topk' in the query: known are model, top_k"),
        ("?top_k=1&top_k=2", b"", None, 400, "given twice"),
        ("?model=absent", b"", None, 404, "unknown model 'absent'"),
        ("", bytes(2001), None, 413, "a body of 2,001 bytes, over the limit of 2,000"),
        ("", encoded(Image.new("RGB", (101, 100))), None, 413, "101x100 pixels"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_a_request_that_is_refused(
    colours: Path, target: str, body: bytes, kind: str | None, status: int, problem: str
) -> None:
    async def test(client: Client) -> None:
        answer = await client.post(f"/v1/predict{target}", body, kind)
        assert answer.status == status
        assert problem in answer.error

    ask(test, colours, max_pixels=10_000, max_body_bytes=2000)


def test_too_many_images(colours: Path) -> None:
    async def test(client: Client) -> None:
        answer = await post_form(client, [("a", encoded(RED))] * 3)
        assert (answer.status, answer.error) == (413, "over 2 images in one form: send them in several requests")

    ask(test, colours, max_images=2)


def test_images_that_the_model_does_not_take(planted: Path) -> None:
    async def test(client: Client) -> None:
        answer = await client.post("/v1/predict", encoded(Image.new("RGB", (6, 4), POISON)))
        assert answer.status == 400
        assert answer.error.startswith("model planted does not run on uint8")
        assert str(planted.parent) not in answer.error

    ask(test, planted)


def test_a_model_that_is_not_ready(planted: Path) -> None:
    async def test(client: Client) -> None:
        planted.with_suffix(".failing").touch()
        answer = await client.post("/v1/predict", encoded(RED))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.error == "model planted has failed: try again in a second"
        ready = await client.get("/readyz")
        assert (ready.status, ready.json) == (503, {"status": "failed"})
        assert (await client.get("/v2/health/ready")).json == {"ready": False}
        assert (await client.get("/v2/models/planted/ready")).status == 503
        assert not (await client.get("/v1/models")).json["models"][0]["ready"]
        planted.with_suffix(".failing").unlink()
        assert (await client.post("/v1/predict", encoded(RED))).status == 200
        assert (await client.get("/readyz")).status == 200

    ask(test, planted)


async def held(client: Client, planted: Path) -> "asyncio.Task[Answer]":
    """A request whose images the model does not end to compute."""
    slow = planted.with_suffix(".slow")
    slow.touch()
    task = asyncio.create_task(_other(client).post("/v1/predict", encoded(RED)))
    await asyncio.sleep(0.05)
    return task


def _other(client: Client) -> Client:
    """Another connection."""
    return Client(client.application, client.service, client.metrics)


def test_a_full_queue(planted: Path) -> None:
    async def test(client: Client) -> None:
        first = await held(client, planted)
        second = asyncio.create_task(_other(client).post("/v1/predict", encoded(GREEN)))
        await asyncio.sleep(0.05)
        refused = await client.post("/v1/predict", encoded(BLUE))
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert refused.error == "1 images are waiting, and 1 may: try again in a second"
        planted.with_suffix(".slow").unlink()
        assert [(await task).json["predictions"][0]["label"] for task in (first, second)] == ["red", "green"]

    ask(test, planted, max_queue=1)


def test_past_the_deadline(planted: Path) -> None:
    async def test(client: Client) -> None:
        first = await held(client, planted)
        second = await client.post("/v1/predict", encoded(RED))
        for answer in (await first, second):
            assert answer.status == 504
            assert answer.error.startswith("no answer within 0.3 s")
        planted.with_suffix(".slow").unlink()

    ask(test, planted, deadline_s=0.3)


def test_who_left_is_not_computed_for(planted: Path) -> None:
    async def test(client: Client) -> None:
        first = await held(client, planted)
        gone = _other(client)
        waiting = asyncio.create_task(gone.post("/v1/predict", encoded(GREEN)))
        await asyncio.sleep(0.05)
        gone.left.set()
        planted.with_suffix(".slow").unlink()
        assert (await first).status == 200
        with pytest.raises(ValueError, match="unpack"):
            await waiting
        assert gone.sent == []
        assert b'cifarx_batch_images_sum{model="planted"} 1.0' in client.metrics.page()

    ask(test, planted)


def test_a_request_whose_body_comes_while_versions_are_swapped(colours: Path) -> None:
    """It is answered by the version that it came to."""

    async def test(client: Client) -> None:
        data, rest = encoded(RED), asyncio.Event()
        old, sent = client.service.serving(None).model.version, [data[:10], data[10:]]

        async def receive() -> dict[str, Any]:
            if len(sent) < 2:
                await rest.wait()
            if not sent:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": sent.pop(0), "more_body": bool(sent)}

        answer: list[Any] = []

        async def send(message: Any) -> None:
            answer.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "headers": []}
        asking = asyncio.create_task(client.application(scope, receive, send))
        await asyncio.sleep(0.02)
        write_onnx(colours, order=(2, 1, 0))
        swapping = asyncio.create_task(client.service.swap(lambda _: None))
        async with asyncio.timeout(20):
            while client.service.serving(None).model.version == old:
                await asyncio.sleep(0.01)
        assert (await client.post("/v1/predict", encoded(RED))).json["predictions"][0]["label"] == "blue"
        rest.set()
        await asking
        found = json.loads(answer[1]["body"])
        assert (found["version"], found["predictions"][0]["label"]) == (old, "red")
        await swapping

    ask(test, colours)


# /v1/models, health, metrics, pages


def test_the_models_are_told_with_their_specs(colours: Path, trained: Trained) -> None:
    async def test(client: Client) -> None:
        first, second = (await client.get("/v1/models")).json["models"]
        assert (first["name"], first["file"], first["backend"]) == (trained.onnx.stem, trained.onnx.name, "onnxruntime")
        assert (first["provider"], first["ready"]) == ("CPUExecutionProvider", True)
        assert first["loaded_at"].endswith("Z")
        assert len(first["version"]) == 12
        spec = ModelSpec.from_json(json.dumps(first["spec"]), "the answer")
        assert spec.parity is not None
        assert spec.parity.passed
        assert ModelSpec.from_json(json.dumps(second["spec"]), "the answer") == SPEC

    ask(test, trained.onnx, colours)


def test_health(colours: Path) -> None:
    async def test(client: Client) -> None:
        for path, healthy in [
            ("/healthz", {"status": "alive"}),
            ("/readyz", {"status": "ready"}),
            ("/v2/health/live", {"live": True}),
            ("/v2/health/ready", {"ready": True}),
        ]:
            answer = await client.get(path)
            assert (answer.status, answer.json) == (200, healthy)
        client.service.draining = True
        assert (await client.get("/readyz")).json == {"status": "draining"}
        assert (await client.get("/v2/models/colours/ready")).status == 503
        assert (await client.get("/healthz")).status == 200

    ask(test, colours)


def test_before_the_models_are_open(colours: Path) -> None:
    async def test(client: Client) -> None:
        answer = await client.get("/readyz")
        assert (answer.status, answer.json) == (503, {"status": "starting"})
        assert (await client.get("/healthz")).status == 200
        assert (await client.get("/v1/models")).json == {"models": []}
        for early in (await client.post("/v1/predict", encoded(RED)), await client.get("/v2/models/colours")):
            assert (early.status, early.headers["retry-after"]) == (503, "1")

    ask(test, colours, open_models=False)


def test_figures_are_for_prometheus(colours: Path) -> None:
    async def test(client: Client) -> None:
        await post_form(client, [("a", encoded(RED)), ("b", encoded(BLUE))])
        await client.post("/v1/predict", b"no image")
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        page = answer.body.decode()
        assert 'cifarx_requests_total{route="/v1/predict",status="200"} 1.0' in page
        assert 'cifarx_requests_total{route="/v1/predict",status="400"} 1.0' in page
        assert 'cifarx_errors_total{cause="bad_request"} 1.0' in page
        assert 'cifarx_batch_images_sum{model="colours"} 2.0' in page

    ask(test, colours)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_take_nothing_from_elsewhere(colours: Path, path: str) -> None:
    async def test(client: Client) -> None:
        answer = await client.get(path)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.body.lower().startswith(b"<!doctype html>")
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob: data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    ask(test, colours)


def test_what_a_key_is_asked_for(colours: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret")
    closed = [
        "/v1/models",
        "/metrics",
        "/v2/models/colours",
        "/v2/models/colours/ready",
        "/v2/models/colours/versions/1",
    ]
    free = ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready"]

    async def test(client: Client) -> None:
        assert [(await client.get(path)).status for path in closed] == [401] * len(closed)
        assert [(await client.get(path)).status for path in free] == [200] * len(free)
        assert (await client.post("/v1/predict", encoded(RED))).status == 401
        assert (await client.post("/v2/models/colours/infer", b"{}")).status == 401
        headers = {"x-api-key": "secret"}
        assert (await client.ask("POST", "/v1/predict", encoded(RED), headers)).status == 200

    ask(test, colours, keys=keys)


# /v2


def triton_request(batch: NDArray[Any], binary: bool) -> tuple[bytes, dict[str, str]]:
    datatype = {"float32": "FP32", "uint8": "UINT8"}[batch.dtype.name]
    tensor = InferInput("input", batch.shape, datatype)
    tensor.set_data_from_numpy(batch, binary_data=binary)
    outputs = [InferRequestedOutput("logits", binary_data=binary)]
    body, length = InferenceServerClient.generate_request_body([tensor], outputs=outputs)
    return body, {} if length is None else {"inference-header-content-length": str(length)}


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("version", [False, True], ids=["any", "version"])
def test_logits_are_those_of_the_predictor(trained: Trained, binary: bool, version: bool) -> None:
    pixels = np.asarray(noise(32, 32))[None].repeat(3, axis=0)
    with load(trained.onnx, device="cpu") as predictor:
        batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
        wanted = predictor.run(batch)
        [prediction] = predictor.predict([pixels[0]], logits=True)

    async def test(client: Client) -> None:
        path = f"/v2/models/{trained.onnx.stem}"
        if version:
            path += f"/versions/{client.service.serving(None).model.version}"
        for tensor, logits in [(batch, wanted), (pixels, np.array([prediction.logits] * 3))]:
            body, headers = triton_request(tensor, binary)
            answer = await client.ask("POST", f"{path}/infer", body, headers)
            assert answer.status == 200
            length = answer.headers.get("inference-header-content-length")
            assert (length is not None) == binary
            assert answer.headers["content-type"] == f"application/{'octet-stream' if binary else 'json'}"
            read = InferenceServerClient.parse_response_body(answer.body, header_length=length and int(length))
            assert read.as_numpy("logits") == pytest.approx(logits, abs=1e-4)

    ask(test, trained.onnx)


def test_a_large_document_is_read_as_a_small_one(colours: Path) -> None:
    """More than is read at once, and more images than one call of the model takes."""
    batch = np.random.default_rng(0).random((64, 3, 4, 6), dtype=np.float32)
    body, _ = triton_request(batch.repeat(4, axis=0), binary=False)
    assert len(body) > 256 * 1024

    async def test(client: Client) -> None:
        answer = (await client.post("/v2/models/colours/infer", body)).json
        assert answer["outputs"][0]["shape"] == [256, 3]
        logits = np.reshape(answer["outputs"][0]["data"], (256, 3))
        assert logits == pytest.approx(10 * batch.repeat(4, axis=0).mean((2, 3)), abs=1e-4)

    ask(test, colours, max_images=256)


def test_the_protocols_metadata(colours: Path) -> None:
    async def test(client: Client) -> None:
        assert (await client.get("/v2")).json["name"] == "cifarx"
        model = (await client.get("/v2/models/colours")).json
        version = client.service.serving(None).model.version
        assert (model["name"], model["versions"], model["platform"]) == ("colours", [version], "onnx_onnxruntime")
        assert model["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 4, 6]}]
        assert model["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]
        assert (await client.get(f"/v2/models/colours/versions/{version}")).json == model
        ready = (await client.get(f"/v2/models/colours/versions/{version}/ready")).json
        assert ready == {"name": "colours", "ready": True}

    ask(test, colours)


@pytest.mark.parametrize(
    ("method", "path", "status", "problem"),
    [
        ("GET", "/v2/models/absent", 404, "unknown model 'absent'"),
        ("GET", "/v2/models/absent/ready", 404, "unknown model 'absent'"),
        ("POST", "/v2/models/absent/infer", 404, "unknown model 'absent'"),
        ("GET", "/v2/models/colours/versions/1", 404, "no version '1' of model colours: it is served in version"),
        ("GET", "/v2/models/colours/versions/1/ready", 404, "no version '1'"),
        ("POST", "/v2/models/colours/versions/1/infer", 404, "no version '1'"),
        ("GET", "/v2/models/colours/infer", 405, "it has POST"),
        ("POST", "/v2/models/colours", 405, "it has GET, HEAD"),
        ("POST", "/v2/models/colours/infer", 400, "the body is no inference request"),
    ],
)
def test_what_the_protocol_refuses(colours: Path, method: str, path: str, status: int, problem: str) -> None:
    async def test(client: Client) -> None:
        answer = await client.ask(method, path)
        assert answer.status == status
        assert problem in answer.error

    ask(test, colours)


@pytest.mark.parametrize("length", ["", "x", "-1", "1e1", "9" * 13, "3"])
def test_a_header_length_that_means_nothing(colours: Path, length: str) -> None:
    async def test(client: Client) -> None:
        headers = {"inference-header-content-length": length}
        answer = await client.ask("POST", "/v2/models/colours/infer", b"{}", headers)
        assert answer.status == 400
        assert "Inference-Header-Content-Length" in answer.error

    ask(test, colours)


def test_a_tensor_over_the_limits(colours: Path) -> None:
    body, headers = triton_request(np.zeros((3, 3, 4, 6), np.float32), binary=True)

    async def test(client: Client) -> None:
        answer = await client.ask("POST", "/v2/models/colours/infer", body, headers)
        assert (answer.status, "3 images in one request" in answer.error) == (413, True)

    ask(test, colours, max_images=2)
