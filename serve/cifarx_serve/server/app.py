"""Creates what serves HTTP and gRPC in one process, from the settings."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from cifarx_serve.backends.registry import register_backend
from cifarx_serve.errors import UsageError
from cifarx_serve.server.api.errors import to_http_error
from cifarx_serve.server.api.routes import create_routes
from cifarx_serve.server.asgi import Application
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.http.forwarded import TrustedProxies
from cifarx_serve.server.inference.deadline import ThreadPool
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.model_control import ModelControl
from cifarx_serve.server.inference.readiness import Readiness
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.settings import Settings
from cifarx_serve.system.cpus import set_cpu_limit

if TYPE_CHECKING:
    from cifarx_serve.server.grpc.server import GrpcServer
    from cifarx_serve.server.tracing.tracer import RequestTracer

_SWITCH_INTERVAL_S: Final = 5e-4
"""How long a thread may keep the interpreter while another one waits for it; Python's default is 5 ms."""


def configure_process(settings: Settings) -> None:
    """Register the backends and set the number of threads of this process; call it before a model is opened."""
    for backend in settings.registered_backends:
        register_backend(*backend)
    set_cpu_limit(settings.threads)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


class Components(NamedTuple):
    """What HTTP and gRPC share.

    Attributes:
        repository: the models; they are not opened yet.
        metrics: counts the requests and batches.
        decoder: decodes encoded images.
        threads: the threads that parse large requests.
        api_keys: the accepted API keys; None if no key is required.
        access_log: receives a line per request, unless it is None.
        control: loads and unloads models.
        tracer: records traces; None to record none.
    """

    repository: ModelRepository
    metrics: Metrics
    decoder: ImageDecoder
    threads: ThreadPool
    api_keys: ApiKeys | None
    access_log: AccessLog | None
    control: ModelControl
    tracer: "RequestTracer | None"


def create_components(
    settings: Settings,
    access_log: AccessLog | None,
    worker: int = 0,
    on_event: Callable[[str], None] = lambda _: None,
) -> Components:
    """Create the components in the event loop that will run them.

    Args:
        settings: the settings of the server.
        access_log: receives a line per request, unless it is None.
        worker: the number of this process among those that share their metrics.
        on_event: called with a line of text for each event in a thread.

    Raises:
        UsageError: the file of the API keys cannot be read, traces cannot be recorded, or as for
            `image_format.extra_formats`.
    """
    metrics = Metrics(worker)
    repository = ModelRepository(settings, metrics)
    api_keys = ApiKeys(Path(settings.api_key_file)) if settings.api_key_file else None
    decoder = ImageDecoder(settings.threads, settings.limits.max_pixels)
    threads, control = ThreadPool(settings.threads, "parse"), ModelControl(repository)
    tracer = _create_tracer(settings, on_event)
    return Components(repository, metrics, decoder, threads, api_keys, access_log, control, tracer)


def _create_tracer(settings: Settings, on_event: Callable[[str], None]) -> "RequestTracer | None":
    if settings.otlp_endpoint is None:
        return None
    try:
        from cifarx_serve.server.tracing.tracer import OtlpExporter, RequestTracer  # only here: imports OpenTelemetry

        return RequestTracer(OtlpExporter(settings.otlp_endpoint, on_event), settings.trace_share, on_event)
    except ValueError as error:  # OpenTelemetry reads its variables when it is imported, and later
        raise UsageError(f"traces cannot be recorded ({error})", "check the environment variables OTEL_*") from error


def create_app(components: Components) -> Application:
    """Create the application that serves HTTP."""
    repository, metrics, decoder, threads, api_keys, access_log, control, tracer = components
    routes = create_routes(repository, metrics, decoder, threads, control)
    return Application(repository, metrics, routes, to_http_error, api_keys, access_log, tracer)


def create_grpc_server(components: Components, address: str) -> "GrpcServer":
    """Create the server that serves gRPC at an address; it does not listen yet.

    Raises:
        UsageError: the TLS files cannot be read.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when gRPC is imported; the access log has errors of clients
    from cifarx_serve.server.grpc.handlers import Handlers  # only here: these modules import gRPC
    from cifarx_serve.server.grpc.health_service import HealthService
    from cifarx_serve.server.grpc.inference_service import InferenceService
    from cifarx_serve.server.grpc.reflection_service import ReflectionService
    from cifarx_serve.server.grpc.server import GrpcServer
    from cifarx_serve.server.grpc.triton_methods import TritonMethods

    repository, metrics, decoder = components.repository, components.metrics, components.decoder
    readiness, settings = Readiness(repository, decoder), repository.settings
    methods = {
        **InferenceService(repository, readiness, decoder, components.threads).methods(),
        **TritonMethods(repository, metrics, components.control).methods(),
        **HealthService(repository, readiness).methods(),
        **ReflectionService().methods(),
    }
    trusted_proxies = TrustedProxies(settings.trusted_proxies) if settings.trusted_proxies else None
    api_keys, access_log, tracer = components.api_keys, components.access_log, components.tracer
    handlers = Handlers(methods, settings.limits, metrics, api_keys, access_log, trusted_proxies, tracer)
    return GrpcServer(handlers, settings, address)
