"""The routes below `/v1`."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from urllib3.filepost import encode_multipart_formdata

from cifarx_serve.images.preprocess import model_input
from cifarx_serve.predictor import load
from cifarx_serve.spec import ModelSpec
from tests.support.asgi_client import AsgiClient, Response, encode_image, run_with_client
from tests.support.color_model import SPEC, write_onnx, write_relative_onnx
from tests.support.faulty_backend import POISON, write_faulty_model
from tests.support.spec_model import BGR, GRAYSCALE, RGB, make_spec, write_model
from tests.support.trained_model import Trained

RED, GREEN, BLUE = (Image.new("RGB", (9, 5), color) for color in ("red", "lime", "blue"))


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


async def post_form(client: AsgiClient, files: list[tuple[str, bytes]], target: str = "/v1/predict") -> Response:
    body, content_type = encode_multipart_formdata([("image", file) for file in files])
    return await client.post(target, body, content_type)


def expected_prediction(path: Path, image: bytes, top_k: int) -> dict[str, Any]:
    """Return what the predictor returns, as JSON."""
    with load(path, device="cpu") as predictor:
        prediction: dict[str, Any] = msgspec.to_builtins(predictor.predict(image, top_k))
    return prediction | {"top": list(prediction["top"])}


def is_same(prediction: dict[str, Any], expected: dict[str, Any]) -> bool:
    scores = [candidate["score"] for candidate in prediction["top"]]
    assert scores == pytest.approx([candidate["score"] for candidate in expected["top"]], abs=1e-6)
    assert prediction["score"] == scores[0]
    return [(entry["label"], entry["index"]) for entry in [prediction, *prediction["top"]]] == [
        (entry["label"], entry["index"]) for entry in [expected, *expected["top"]]
    ]


def test_predictions_are_those_of_the_predictor(trained: Trained) -> None:
    """For every image format, as a body and in a form."""
    files = {image_format: encode_image(noise(), image_format) for image_format in ("PNG", "JPEG", "WEBP")}
    files["large"] = encode_image(noise(400, 300))

    async def test(client: AsgiClient) -> None:
        for data in files.values():
            response = (await client.post("/v1/predict", data, "image/png")).json
            assert response["model"] == trained.onnx.stem
            [prediction] = response["predictions"]
            assert prediction["image"] is None
            assert is_same(prediction, expected_prediction(trained.onnx, data, 5))
        form = (await post_form(client, list(files.items()))).json
        assert [prediction["image"] for prediction in form["predictions"]] == list(files)
        for prediction, data in zip(form["predictions"], files.values(), strict=True):
            assert is_same(prediction, expected_prediction(trained.onnx, data, 5))

    run_with_client(test, trained.onnx)


def test_predictions_of_a_photograph(trained: Trained, dog: Path) -> None:
    async def test(client: AsgiClient) -> None:
        response = (await client.post("/v1/predict", dog.read_bytes())).json
        assert is_same(response["predictions"][0], expected_prediction(trained.onnx, dog.read_bytes(), 5))

    run_with_client(test, trained.onnx)


def test_a_model_with_embedded_preprocessing_gets_the_images_unchanged(faulty_model: Path) -> None:
    write_faulty_model(faulty_model, embedded=True)
    files = [
        (f"{number}.png", encode_image(image)) for number, image in enumerate([RED, noise(), BLUE, GREEN, noise(7, 3)])
    ]

    async def test(client: AsgiClient) -> None:
        response = (await post_form(client, files, "/v1/predict?top_k=3")).json
        for prediction, (name, data) in zip(response["predictions"], files, strict=True):
            assert prediction["image"] == name
            assert is_same(prediction, expected_prediction(faulty_model, data, 3))

    run_with_client(test, faulty_model)


@pytest.mark.slow
def test_predictions_of_an_exported_model_with_embedded_preprocessing(trained: Trained, tmp_path: Path) -> None:
    from cifarx_export.export import export
    from cifarx_export.formats.registry import ExportOptions

    options = ExportOptions(embed_preprocessing=True)
    [made] = export(trained.checkpoint, ["onnx"], data="builtin", out=tmp_path, options=options)
    files = [("a.png", encode_image(noise())), ("b.jpg", encode_image(noise(64, 48), "JPEG"))]

    async def test(client: AsgiClient) -> None:
        response = (await post_form(client, files)).json
        for prediction, (_, data) in zip(response["predictions"], files, strict=True):
            assert is_same(prediction, expected_prediction(made.path, data, 5))

    run_with_client(test, made.path)


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(GRAYSCALE),
        make_spec(msgspec.structs.replace(BGR, layout="NHWC"), output="probabilities"),
        make_spec(GRAYSCALE, embedded_preprocessing=True),
        make_spec(activation="sigmoid"),
        make_spec(class_names=("no", "yes"), activation="sigmoid", outputs=1, thresholds=(0.4,)),
        make_spec(msgspec.structs.replace(RGB, resize="letterbox", fill=114)),
    ],
    ids=["grayscale", "BGR, NHWC, probabilities", "embedded grayscale", "labels", "one output", "letterbox"],
)
def test_models_of_every_kind_are_served(tmp_path: Path, spec: ModelSpec) -> None:
    """The predictions are those of the predictor, for images of several sizes in one request."""
    path = write_model(tmp_path / "means.onnx", spec)
    files = [(f"{number}.png", encode_image(image)) for number, image in enumerate([RED, noise(), GREEN, noise(7, 3)])]

    async def test(client: AsgiClient) -> None:
        response = (await post_form(client, files, "/v1/predict?top_k=2")).json
        for prediction, (name, data) in zip(response["predictions"], files, strict=True):
            expected = expected_prediction(path, data, 2)
            assert prediction["image"] == name
            assert is_same(prediction, expected)
            assert ("labels" in prediction) == spec.multi_label
            if spec.multi_label:
                labels = [entry["label"] for entry in prediction["labels"]]
                assert labels == [entry["label"] for entry in expected["labels"]]
        model = (await client.get("/v2/models/means")).json
        assert model["outputs"] == [{"name": spec.output, "datatype": "FP32", "shape": [-1, spec.output_size]}]
        size, channels = spec.input, spec.input.channels
        pixels = np.random.default_rng(0).integers(0, 256, (1, size.height, size.width, channels), np.uint8)
        tensor = {"name": "input", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.ravel().tolist()}
        body = json.dumps({"inputs": [tensor]}).encode()
        [output] = (await client.post("/v2/models/means/infer", body)).json["outputs"]
        with load(path, device="cpu") as predictor:
            expected_output = predictor.run(model_input(pixels, spec))
        assert (output["name"], output["data"]) == (spec.output, pytest.approx(expected_output[0].tolist(), abs=1e-5))

    run_with_client(test, path)


def test_no_label_may_apply(tmp_path: Path) -> None:
    path = write_model(tmp_path / "means.onnx", make_spec(activation="sigmoid", thresholds=(1, 1, 1)))

    async def test(client: AsgiClient) -> None:
        [prediction] = (await client.post("/v1/predict", encode_image(noise()))).json["predictions"]
        assert prediction["labels"] == []
        assert len(prediction["top"]) == 3

    run_with_client(test, path)


@pytest.mark.parametrize("assumed", [(), ("architecture", "class_names")])
def test_the_list_of_models_marks_what_was_assumed(tmp_path: Path, assumed: tuple[str, ...]) -> None:
    path = write_model(tmp_path / "means.onnx", make_spec(assumed=assumed))

    async def test(client: AsgiClient) -> None:
        [model] = (await client.get("/v1/models")).json["models"]
        assert model["spec"]["assumed"] == list(assumed)
        if assumed:
            assert model["assumption"].startswith("ASSUMED architecture, class names: ")
        else:
            assert model["assumption"] is None

    run_with_client(test, path)


def test_the_response_has_the_model_and_the_timing(color_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        body = (await client.post("/v1/predict", encode_image(RED))).json
        assert list(body) == ["model", "version", "predictions", "timing_us"]
        assert body["version"] == client.repository.get().model.version
        timing = body["timing_us"]
        assert list(timing) == ["decode", "queue", "compute", "total"]
        assert all(isinstance(spent, int) and spent >= 0 for spent in timing.values())
        assert timing["total"] >= timing["decode"] + timing["compute"]

    run_with_client(test, color_model)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k(color_model: Path, top_k: int) -> None:
    async def test(client: AsgiClient) -> None:
        [prediction] = (await client.post(f"/v1/predict?top_k={top_k}", encode_image(GREEN))).json["predictions"]
        assert is_same(prediction, expected_prediction(color_model, encode_image(GREEN), top_k))
        assert len(prediction["top"]) == top_k

    run_with_client(test, color_model)


@pytest.mark.parametrize("top_k", ["0", "4", "-1", "1.0", "", "x", "1e0", "\u0661", "9" * 7])
def test_an_invalid_top_k_is_refused(color_model: Path, top_k: str) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.post(f"/v1/predict?top_k={top_k}", encode_image(GREEN))
        assert response.status == 400
        assert response.error.startswith("top_k is ")
        assert response.error.endswith(": send a number from 1 to 3")

    run_with_client(test, color_model)


def test_a_model_is_selected_by_name(color_model: Path, tmp_path: Path) -> None:
    other = write_onnx(tmp_path / "turned.onnx", order=(2, 1, 0))

    async def test(client: AsgiClient) -> None:
        for query, label in [("", "red"), ("?model=colors", "red"), ("?model=turned&top_k=1", "blue")]:
            response = (await client.post(f"/v1/predict{query}", encode_image(RED))).json
            assert response["predictions"][0]["label"] == label
        absent = await client.post("/v1/predict?model=color", encode_image(RED))
        assert absent.status == 404
        assert "did you mean 'colors'?" in absent.error

    run_with_client(test, color_model, other)


def test_the_fields_of_a_form_and_of_json_are_those_of_the_query(color_model: Path, tmp_path: Path) -> None:
    other, image = write_onnx(tmp_path / "turned.onnx", order=(2, 1, 0)), encode_image(RED)
    encoded = base64.b64encode(image).decode()
    bodies = [encode_multipart_formdata([("image", ("a.png", image)), ("model", "turned"), ("top_k", "1")])] + [
        (json.dumps({**sent, "model": "turned", "top_k": 1}).encode(), "application/json")
        for sent in ({"image": encoded}, {"instances": [{"b64": encoded}]})
    ]

    async def test(client: AsgiClient) -> None:
        for body, content_type in bodies:
            response = (await client.post("/v1/predict", body, content_type)).json
            [prediction] = response["predictions"]
            assert (response["model"], prediction["label"], len(prediction["top"])) == ("turned", "blue", 1)
            both = await client.post("/v1/predict?top_k=1", body, content_type)
            assert (both.status, both.error) == (400, "top_k is stated in the body and outside of it: state it once")
        for name, value, status, problem in [
            ("model", "absent", 404, "unknown model 'absent'"),
            ("top_k", "0", 400, "top_k is '0': send a number from 1 to 3"),
            ("topk", "1", 400, "unknown form field 'topk': use image, images, model, top_k"),
        ]:
            refused = await client.post(
                "/v1/predict", *encode_multipart_formdata([("image", ("a.png", image)), (name, value)])
            )
            assert refused.status == status
            assert problem in refused.error

    run_with_client(test, color_model, other)


def test_the_v1_protocol_of_kserve(color_model: Path, tmp_path: Path) -> None:
    other = write_onnx(tmp_path / "turned.onnx", order=(2, 1, 0))
    images = {"first": RED, "second": GREEN}
    instances = [
        {"image_bytes": {"b64": base64.b64encode(encode_image(image)).decode()}, "key": key}
        for key, image in images.items()
    ]
    body = json.dumps({"instances": instances}).encode()

    async def test(client: AsgiClient) -> None:
        response = await client.post("/v1/models/turned:predict?top_k=2", body, "application/json")
        assert list(response.json) == ["predictions"]
        assert [(entry["image"], entry["label"], len(entry["top"])) for entry in response.json["predictions"]] == [
            ("first", "blue", 2),
            ("second", "green", 2),
        ]
        for target, status in [
            ("/v1/models/absent:predict", 404),
            ("/v1/models/turned:predict?model=colors", 400),
            ("/v1/models/turned:explain", 405),
        ]:
            assert (await client.post(target, body, "application/json")).status == status
        named = json.dumps({"instances": instances, "model": "colors"}).encode()
        twice = await client.post("/v1/models/turned:predict", named, "application/json")
        assert (twice.status, twice.error) == (400, "model is stated in the body and outside of it: state it once")

    run_with_client(test, color_model, other)


def test_one_model(color_model: Path, tmp_path: Path) -> None:
    other = write_onnx(tmp_path / "turned.onnx", order=(2, 1, 0))

    async def test(client: AsgiClient) -> None:
        for model in (await client.get("/v1/models")).json["models"]:
            assert (await client.get(f"/v1/models/{model['name']}")).json == model
        assert (await client.get("/v1/models/absent")).status == 404

    run_with_client(test, color_model, other)


def test_the_protocol_of_sagemaker(color_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        assert (await client.get("/ping")).status == 200
        response = await client.post("/invocations?top_k=1", encode_image(BLUE), "application/x-image")
        assert response.json["predictions"][0]["label"] == "blue"

    run_with_client(test, color_model)


def test_an_image_that_cannot_be_read_does_not_stop_the_others(color_model: Path) -> None:
    files = [
        ("red", encode_image(RED)),
        ("text", b"no image"),
        ("cut", encode_image(noise())[:200]),
        ("large", encode_image(noise(101, 100))),
        ("blue", encode_image(BLUE)),
    ]

    async def test(client: AsgiClient) -> None:
        response = await post_form(client, files)
        assert response.status == 200
        predictions = response.json["predictions"]
        assert [entry["image"] for entry in predictions] == [name for name, _ in files]
        assert [entry.get("label") for entry in predictions] == ["red", None, None, None, "blue"]
        assert list(predictions[1]) == ["image", "error"]
        assert predictions[1]["error"].startswith("8 bytes is not an image: ")
        assert "truncated or damaged" in predictions[2]["error"]
        assert "101x100 pixels, over the limit of 10,000 pixels" in predictions[3]["error"]

    run_with_client(test, color_model, max_pixels=10_000)


def test_if_no_image_can_be_read_the_error_is_that_of_the_first(color_model: Path) -> None:
    large, text = ("large", encode_image(noise(101, 100))), ("text", b"no image")

    async def test(client: AsgiClient) -> None:
        for files, status in [([text, large], 400), ([large, text], 413)]:
            response = await post_form(client, files)
            assert (response.status, "error" in response.json) == (status, True)

    run_with_client(test, color_model, max_pixels=10_000)


def test_an_image_for_which_the_model_returns_no_numbers_has_an_error(tmp_path: Path) -> None:
    black = encode_image(Image.new("RGB", (9, 5), "black"))
    message = "the model does not return numbers for the image: "

    async def test(client: AsgiClient) -> None:
        both = await post_form(client, [("black", black), ("red", encode_image(RED))])
        refused, answered = both.json["predictions"]
        assert refused["error"].startswith(message)
        assert answered["label"] == "red"
        alone = await client.post("/v1/predict", black)
        assert alone.status == 400
        assert alone.error.startswith(message)

    run_with_client(test, write_relative_onnx(tmp_path / "relative.onnx"))


def test_max_pixels_limits_all_images_of_a_model_with_embedded_preprocessing(faulty_model: Path) -> None:
    """All its images are in memory at the same time."""
    write_faulty_model(faulty_model, embedded=True)
    files = [(name, encode_image(noise(60, 50))) for name in "abc"] + [("d", encode_image(RED))]

    async def test(client: AsgiClient) -> None:
        predictions = (await post_form(client, files)).json["predictions"]
        assert ["error" in entry for entry in predictions] == [False, False, True, False]

    run_with_client(test, faulty_model, max_pixels=6100)


@pytest.mark.parametrize(
    ("target", "body", "content_type", "status", "problem"),
    [
        ("", b"no image", "image/png", 400, "8 bytes is not an image"),
        ("", b"", "image/png", 400, "the body is empty"),
        ("", b"no form", "multipart/form-data; boundary=X", 400, "malformed form"),
        ("", b"", "multipart/form-data", 400, "the Content-Type multipart/form-data has no boundary"),
        ("", b"{}", "text/plain", 415, "the content type 'text/plain' is not supported"),
        ("", b"{}", "application/json", 400, "the JSON has no image"),
        ("?topk=1", b"", None, 400, "unknown query field 'topk': use model or top_k"),
        ("?top_k=1&top_k=2", b"", None, 400, "a query field occurs twice: send each field once"),
        ("?model=absent", b"", None, 404, "unknown model 'absent'"),
        ("", bytes(2001), None, 413, "the body of 2,001 bytes is over the limit of 2,000 bytes"),
        ("", encode_image(Image.new("RGB", (101, 100))), None, 413, "101x100 pixels"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_invalid_requests_are_refused(
    color_model: Path, target: str, body: bytes, content_type: str | None, status: int, problem: str
) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.post(f"/v1/predict{target}", body, content_type)
        assert response.status == status
        assert problem in response.error

    run_with_client(test, color_model, max_pixels=10_000, max_body_bytes=2000)


def test_too_many_images_are_refused(color_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        response = await post_form(client, [("a", encode_image(RED))] * 3)
        assert response.status == 413
        assert response.error == "the form has more than 2 images: send the images in several requests"

    run_with_client(test, color_model, max_images=2)


def test_images_that_the_model_cannot_run_on_are_refused(faulty_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.post("/v1/predict", encode_image(Image.new("RGB", (6, 4), POISON)))
        assert response.status == 400
        assert response.error == "model faulty cannot run on uint8 (1, 4, 6, 3): send images of the shape in /v1/models"
        assert str(faulty_model.parent) not in response.error

    run_with_client(test, faulty_model)


def test_a_failed_model(faulty_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        faulty_model.with_suffix(".failing").touch()
        response = await client.post("/v1/predict", encode_image(RED))
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert response.error == "model faulty has failed: try again in a second"
        ready = await client.get("/readyz")
        assert (ready.status, ready.json) == (503, {"status": "failed"})
        assert (await client.get("/v2/health/ready")).json == {"ready": False}
        assert (await client.get("/v2/models/faulty/ready")).status == 503
        assert not (await client.get("/v1/models")).json["models"][0]["ready"]
        faulty_model.with_suffix(".failing").unlink()
        assert (await client.post("/v1/predict", encode_image(RED))).status == 200
        assert (await client.get("/readyz")).status == 200

    run_with_client(test, faulty_model)


async def submit_and_block(client: AsgiClient, faulty_model: Path) -> "asyncio.Task[Response]":
    """Start a request, and block the model while it runs on its image."""
    slow = faulty_model.with_suffix(".slow")
    slow.touch()
    task = asyncio.create_task(second_client(client).post("/v1/predict", encode_image(RED)))
    await asyncio.sleep(0.05)
    return task


def second_client(client: AsgiClient) -> AsgiClient:
    """Return a client with another connection."""
    return AsgiClient(client.app)


def test_a_full_queue(faulty_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        first = await submit_and_block(client, faulty_model)
        second = asyncio.create_task(second_client(client).post("/v1/predict", encode_image(GREEN)))
        await asyncio.sleep(0.05)
        refused = await client.post("/v1/predict", encode_image(BLUE))
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert refused.error == "the queue is full, with 1 images of at most 1: try again in a second"
        faulty_model.with_suffix(".slow").unlink()
        assert [(await task).json["predictions"][0]["label"] for task in (first, second)] == ["red", "green"]

    run_with_client(test, faulty_model, max_queue=1)


def test_a_request_past_its_deadline(faulty_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        first = await submit_and_block(client, faulty_model)
        second = await client.post("/v1/predict", encode_image(RED))
        for response in (await first, second):
            assert response.status == 504
            assert response.error == "no response within 0.3 s: try again when the server is less busy"
        faulty_model.with_suffix(".slow").unlink()

    run_with_client(test, faulty_model, deadline_s=0.3)


def test_images_of_a_disconnected_client_are_not_run(faulty_model: Path) -> None:
    async def test(client: AsgiClient) -> None:
        first = await submit_and_block(client, faulty_model)
        disconnected = second_client(client)
        request = asyncio.create_task(disconnected.post("/v1/predict", encode_image(GREEN)))
        await asyncio.sleep(0.05)
        disconnected.disconnected.set()
        faulty_model.with_suffix(".slow").unlink()
        assert (await first).status == 200
        with pytest.raises(ValueError, match="unpack"):
            await request
        assert disconnected.sent == []
        assert b'cifarx_batch_images_sum{model="faulty"} 1.0' in client.metrics.render()

    run_with_client(test, faulty_model)


def test_a_request_that_is_received_during_a_reload(color_model: Path) -> None:
    """It is answered by the old version."""

    async def test(client: AsgiClient) -> None:
        data, send_rest = encode_image(RED), asyncio.Event()
        old, chunks = client.repository.get().model.version, [data[:10], data[10:]]

        async def receive() -> dict[str, Any]:
            if len(chunks) < 2:
                await send_rest.wait()
            if not chunks:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "headers": []}
        request = asyncio.create_task(client.app(scope, receive, send))
        await asyncio.sleep(0.02)
        write_onnx(color_model, order=(2, 1, 0))
        reloading = asyncio.create_task(client.repository.reload(lambda _: None))
        async with asyncio.timeout(20):
            while client.repository.get().model.version == old:
                await asyncio.sleep(0.01)
        assert (await client.post("/v1/predict", encode_image(RED))).json["predictions"][0]["label"] == "blue"
        send_rest.set()
        await request
        body = json.loads(messages[1]["body"])
        assert (body["version"], body["predictions"][0]["label"]) == (old, "red")
        await reloading

    run_with_client(test, color_model)


def test_models_are_listed_with_their_specs(color_model: Path, trained: Trained) -> None:
    async def test(client: AsgiClient) -> None:
        first, second = (await client.get("/v1/models")).json["models"]
        assert (first["name"], first["file"], first["backend"]) == (trained.onnx.stem, trained.onnx.name, "onnxruntime")
        assert (first["provider"], first["ready"]) == ("CPUExecutionProvider", True)
        assert first["loaded_at"].endswith("Z")
        assert len(first["version"]) == 12
        spec = ModelSpec.from_json(json.dumps(first["spec"]), "the response")
        assert spec.parity is not None
        assert spec.parity.passed
        assert ModelSpec.from_json(json.dumps(second["spec"]), "the response") == SPEC

    run_with_client(test, trained.onnx, color_model)
