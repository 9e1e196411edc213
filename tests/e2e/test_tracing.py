"""Traces of `cifarx serve` at a collector: a small HTTP server that parses what OpenTelemetry's exporter sends."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from PIL import Image

from tests.support.asgi_client import encode_image
from tests.support.color_model import write_onnx
from tests.support.server_process import predict_request, run_server, start_server, wait_until

pytestmark = pytest.mark.slow

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Collects the spans that are exported over OTLP/HTTP; `responds` makes it refuse or hang."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: list[str] = []
        self.status = 200
        self.released = threading.Event()
        self.released.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.released.wait(60)
                if collector.status == 200:
                    collector.paths.append(self.path)
                    collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(collector.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[Any]:
        return [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextmanager
def run_collector() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


def test_traces_reach_the_collector_before_the_server_exits(tmp_path: Path, model: Path) -> None:
    with run_collector() as collector:
        options = ("--workers", 2, "--otlp-endpoint", collector.url)
        with run_server(tmp_path / "server", model, *options, OTEL_BSP_SCHEDULE_DELAY="60000") as server:
            traceparent = f"00-{TRACE}-{PARENT}-01".encode()
            with server.connect() as client:
                client.send(predict_request().replace(b"\r\n\r\n", b"\r\ntraceparent: %b\r\n\r\n" % traceparent, 1))
                response = client.read_response()
            assert response.status == 200
            for _ in range(9):
                assert server.predict().status == 200
            assert collector.spans() == []
            assert server.stop() == 0
            assert "note:" not in server.err
        spans = collector.spans()
        assert set(collector.paths) == {"/v1/traces"}
        assert sorted(span.name for span in spans) == sorted(["POST /v1/predict", "decode", "queue", "compute"] * 10)
        traced = {span.name: span for span in spans if span.trace_id.hex() == TRACE}
        root = traced["POST /v1/predict"]
        assert root.parent_span_id.hex() == PARENT
        assert response.headers["traceresponse"][:52] == f"00-{TRACE}-{root.span_id.hex()}"
        for name in ("decode", "queue", "compute"):
            assert traced[name].parent_span_id == root.span_id
            assert root.start_time_unix_nano <= traced[name].start_time_unix_nano + 10**6
            assert traced[name].end_time_unix_nano <= root.end_time_unix_nano + 10**6
        timing = response.json["timing_us"]
        compute = traced["compute"].end_time_unix_nano - traced["compute"].start_time_unix_nano
        assert compute / 1000 == pytest.approx(timing["compute"], abs=1)
        resource = collector.requests[0].resource_spans[0].resource
        assert {each.key: each.value.string_value for each in resource.attributes}["service.name"] == "cifarx-serve"
        logged = {record["trace"] for record in map(json.loads, server.out.splitlines())}
        assert logged == {span.trace_id.hex() for span in spans}


# gevent, which Triton's HTTP client uses, patches modules of the standard library that are already imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_calls_over_grpc(tmp_path: Path, model: Path) -> None:
    from tritonclient.grpc import InferenceServerClient, InferInput

    files = np.array([encode_image(Image.new("RGB", (6, 4), "red"))], object)
    tensor = InferInput("input", [1], "BYTES").set_data_from_numpy(files)
    with run_collector() as collector:
        options = ("--workers", 1, "--grpc-port", 0, "--otlp-endpoint", collector.url)
        with run_server(tmp_path / "server", model, *options) as server:
            with InferenceServerClient(server.grpc_address) as client:
                assert client.is_server_live()
                client.infer("colors", [tensor], headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
                client.start_stream(lambda result, error: None)  # noqa: ARG005
                for _ in range(3):
                    client.async_stream_infer("colors", [tensor])
                client.stop_stream()
                with pytest.raises(Exception, match="NOT_FOUND"):
                    client.infer("absent", [tensor])
            assert server.stop() == 0
        names = [span.name for span in collector.spans()]
        service = "inference.GRPCInferenceService"
        assert sorted(set(names)) == sorted(
            ["decode", "queue", "compute", f"{service}/ModelInfer", f"{service}/ModelStreamInfer"]
        )
        assert [names.count(name) for name in ("decode", f"{service}/ModelInfer", f"{service}/ModelStreamInfer")] == [
            4,
            2,
            3,
        ]
        traced = {span.name: span for span in collector.spans() if span.trace_id.hex() == TRACE}
        assert traced[f"{service}/ModelInfer"].parent_span_id.hex() == PARENT
        assert set(traced) == {"decode", "queue", "compute", f"{service}/ModelInfer"}
        assert TRACE in {json.loads(line).get("trace") for line in server.out.splitlines()}


def test_a_share_and_the_variables_of_opentelemetry(tmp_path: Path, model: Path) -> None:
    with run_collector() as collector:
        options = ("--workers", 1, "--otlp-endpoint", f"{collector.url}/v1/traces", "--trace-share", "0.2")
        variables = {"OTEL_SERVICE_NAME": "pictures", "OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
        with run_server(tmp_path / "server", model, *options, **variables) as server:
            for _ in range(100):
                assert server.predict().status == 200
            assert server.stop() == 0
        roots = [span for span in collector.spans() if span.name.startswith("POST")]
        assert 5 <= len(roots) <= 40  # of 100, less likely than 1 in 10,000 by chance
        assert b"pictures" in collector.requests[0].SerializeToString()


def test_a_collector_that_is_down_or_hangs_neither_fails_nor_delays_requests(tmp_path: Path, model: Path) -> None:
    with run_collector() as collector:
        collector.status = 400
        options = ("--workers", 1, "--otlp-endpoint", collector.url)
        with run_server(tmp_path / "server", model, *options, OTEL_BSP_SCHEDULE_DELAY="100") as server:
            assert server.predict().status == 200
            server.wait_for(f"cannot export traces to {collector.url}/v1/traces")
            assert server.predict().status == 200
            collector.status = 200
            assert server.predict().status == 200
            server.wait_for("exports traces to", 1)
            collector.released.clear()
            for _ in range(20):
                assert server.predict().json["timing_us"]["total"] < 5e6
            server.signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
        assert server.err.count("cannot export") == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--trace-share", "0.5"), "--trace-share 0.5 without --otlp-endpoint: name the collector of the traces"),
        (("--otlp-endpoint", "collector:4318"), "--otlp-endpoint 'collector:4318' is not a URL: give it as http://"),
        (("--otlp-endpoint", "http://"), "--otlp-endpoint 'http://' is not a URL: give it as http://"),
        (("--otlp-endpoint", "http://127.0.0.1:9"), "traces cannot be recorded (Propagator nonsense not found"),
    ],
)
def test_invalid_options_and_variables(tmp_path: Path, model: Path, options: tuple[str, ...], problem: str) -> None:
    variables = {"OTEL_PROPAGATORS": "nonsense"} if options[-1] == "http://127.0.0.1:9" else {}
    with start_server(tmp_path / "server", model, *options, **variables) as server:
        assert server.wait() == 2
        assert problem in server.err
        assert "Traceback" not in server.err


def test_a_worker_without_the_option_does_not_import_opentelemetry(tmp_path: Path, model: Path) -> None:
    with run_server(tmp_path / "server", model, "--workers", 1) as server:
        [worker] = server.workers()
        assert server.predict().status == 200
        wait_until(lambda: server.out)
        assert not [mapped.path for mapped in worker.memory_maps() if "protobuf" in mapped.path]
