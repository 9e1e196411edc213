"""The spans of requests, in the exporter of OpenTelemetry that keeps them in memory."""

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from PIL import Image

from cifarx_serve.server.asgi import Route
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.http.response import Response
from cifarx_serve.server.tracing.trace_context import parse_trace_id
from cifarx_serve.server.tracing.tracer import RequestTracer
from tests.support.asgi_client import AsgiClient, encode_image, open_client
from tests.support.color_model import write_onnx

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
RED = encode_image(Image.new("RGB", (6, 4), "red"))


def trace(
    test: Callable[[AsgiClient], Awaitable[None]], share: float | None = None, **options: Any
) -> list[ReadableSpan]:
    """Run a test with a client whose requests are traced, and return the spans in the order of their start."""
    exporter = InMemorySpanExporter()

    async def main() -> None:
        tracer = RequestTracer(exporter, share, pytest.fail)
        async with open_client(tracer=tracer, **options) as client:
            await test(client)
        await tracer.close()

    asyncio.run(main())
    return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {"colors": write_onnx(tmp_path / "colors.onnx")}


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_prediction_has_spans_for_decode_queue_and_compute(files: dict[str, Path]) -> None:
    async def test(client: AsgiClient) -> None:
        headers = {"content-type": "image/png", "traceparent": SAMPLED, "user-agent": "test/1"}
        response = await client.request("POST", "/v1/predict?top_k=1", RED, headers)
        assert response.status == 200
        assert response.headers["traceresponse"].startswith(f"00-{TRACE}-")
        assert response.headers["traceresponse"][36:52] != PARENT

    before = time.time_ns()
    root, decode, queue, compute = trace(test, files=files)
    assert [span.name for span in (root, decode, queue, compute)] == ["POST /v1/predict", "decode", "queue", "compute"]
    assert root.kind is SpanKind.SERVER
    assert root.context is not None
    assert (f"{root.context.trace_id:032x}", root.parent and f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert {span.parent and span.parent.span_id for span in (decode, queue, compute)} == {root.context.span_id}
    expected = {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/predict",
        "url.path": "/v1/predict",
        "url.query": "top_k=1",
        "url.scheme": "http",
        "user_agent.original": "test/1",
        "client.address": "127.0.0.1",
    }
    assert attributes(root).items() >= expected.items()
    assert attributes(decode) == {"cifarx.images": 1}
    model = {"cifarx.model.name": "colors", "cifarx.images": 1}
    assert attributes(queue).items() >= model.items()
    assert attributes(compute).items() >= {**model, "cifarx.batch.images": 1}.items()
    times = [root.start_time, decode.start_time, decode.end_time, queue.start_time]
    times += [queue.end_time, compute.start_time, compute.end_time, root.end_time]
    assert all(isinstance(at, int) for at in times)
    slack = 1_000_000  # nanoseconds: each span reads the clocks for itself
    assert all(one <= other + slack for one, other in pairwise(times))  # type: ignore[operator]
    assert before - slack <= times[0] <= time.time_ns()  # type: ignore[operator]


def test_images_of_several_sizes_and_tensors(files: dict[str, Path]) -> None:
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 3, 4, 6], "data": np.zeros(72).tolist()}

    async def test(client: AsgiClient) -> None:
        response = await client.post("/v2/models/colors/infer", json.dumps({"inputs": [tensor]}).encode())
        assert response.status == 200

    root, queue, compute = trace(test, files=files)
    assert (root.name, queue.name, compute.name) == ("POST /v2/models/{model}/infer", "queue", "compute")
    assert root.parent is None


async def crash(_: Request) -> Response:
    raise ZeroDivisionError


def test_errors_of_the_server_and_of_clients(capsys: pytest.CaptureFixture[str]) -> None:
    async def test(client: AsgiClient) -> None:
        assert (await client.get("/crash")).status == 500
        assert (await client.get("/absent")).status == 404
        assert (await client.request("BREW", "/crash")).status == 405

    crashed, absent, brewed = trace(test, files={}, routes=[Route("GET", "/crash", crash, None)])
    assert (crashed.status.status_code, attributes(crashed)["error.type"]) == (StatusCode.ERROR, "internal")
    assert (absent.name, absent.status.status_code) == ("GET", StatusCode.UNSET)
    assert "http.route" not in attributes(absent)
    assert (brewed.name, attributes(brewed)["http.request.method"]) == ("HTTP /crash", "_OTHER")
    assert attributes(brewed)["http.request.method_original"] == "BREW"
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_probes_have_no_spans(files: dict[str, Path]) -> None:
    async def test(client: AsgiClient) -> None:
        for path in ("/healthz", "/readyz", "/ping", "/metrics", "/v2/health/live", "/v2/health/ready"):
            response = await client.get(path, traceparent=SAMPLED)
            assert response.status == 200
            assert "traceresponse" not in response.headers

    assert trace(test, files=files) == []


@pytest.mark.parametrize(
    ("share", "traceparent", "spans"), [(0.0, None, 0), (1.0, None, 1), (0.0, SAMPLED, 1), (1.0, NOT_SAMPLED, 0)]
)
def test_the_share_is_that_of_requests_that_are_not_part_of_a_trace(
    share: float, traceparent: str | None, spans: int
) -> None:
    async def test(client: AsgiClient) -> None:
        response = await client.request("GET", "/docs", headers={"traceparent": traceparent} if traceparent else {})
        assert int(response.headers["traceresponse"][-1], 16) & 1 == spans  # another bit says that the ID is random

    assert len(trace(test, share, files={})) == spans


def test_the_access_log_has_the_trace() -> None:
    file = io.BytesIO()
    log = AccessLog(file)

    async def test(client: AsgiClient) -> None:
        await client.get("/docs", traceparent=SAMPLED)
        await client.get("/docs")
        log.flush()

    spans = trace(test, files={}, access_log=log)
    traces = [json.loads(line)["trace"] for line in file.getvalue().splitlines()]
    assert traces == [f"{span.context.trace_id:032x}" for span in spans if span.context]
    assert traces[0] == TRACE


def test_without_a_tracer_the_access_log_has_the_trace_of_the_client() -> None:
    file = io.BytesIO()
    log = AccessLog(file)

    async def main() -> None:
        async with open_client({}, access_log=log) as client:
            response = await client.get("/docs", traceparent=SAMPLED)
            assert "traceresponse" not in response.headers
            await client.get("/docs", traceparent="garbage")
            log.flush()

    asyncio.run(main())
    first, second = (json.loads(line) for line in file.getvalue().splitlines())
    assert first["trace"] == TRACE
    assert "trace" not in second


def test_the_service_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: AsgiClient) -> None:
        await client.get("/docs")

    [span] = trace(test, files={})
    assert span.resource.attributes["service.name"] == "cifarx-serve"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    [span] = trace(test, files={})
    assert span.resource.attributes["service.name"] == "pictures"
    assert span.resource.attributes["deployment.environment.name"] == "test"


class StuckExporter(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:  # noqa: ARG002
        time.sleep(30)
        return SpanExportResult.SUCCESS


def test_a_collector_that_does_not_respond_delays_the_end_by_two_seconds_only() -> None:
    async def main() -> float:
        tracer = RequestTracer(StuckExporter(), None, pytest.fail)
        async with open_client({}, tracer=tracer) as client:
            await client.get("/docs")
        started_at = time.perf_counter()
        await tracer.close()
        return time.perf_counter() - started_at

    assert 1.9 < asyncio.run(main()) < 4


def test_spans_for_which_there_is_no_room_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    events: list[str] = []
    tracer = RequestTracer(StuckExporter(), None, events.append)
    for _ in range(40):
        tracer.start("GET", time.perf_counter(), {}, {}).end("GET /", {}, None, time.perf_counter())
    assert events == ["loses spans, which are recorded faster than exported: lower --trace-share"]


@given(st.dictionaries(st.sampled_from(["traceparent", "tracestate", "baggage"]), st.text()))
def test_any_header_begins_or_continues_a_trace(headers: dict[str, str]) -> None:
    span = tracer_of_any_header().start("GET", time.perf_counter(), headers, {})
    assert parse_trace_id(span.traceresponse) == span.trace_id
    span.end("GET", {}, "internal", time.perf_counter())


@cache
def tracer_of_any_header() -> RequestTracer:
    return RequestTracer(InMemorySpanExporter(), None, lambda _: None)
