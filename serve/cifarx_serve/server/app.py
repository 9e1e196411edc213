"""Creates the application of one process from the settings."""

import sys
from pathlib import Path
from typing import Final

from cifarx_serve.backends.registry import register_backend
from cifarx_serve.server.api.errors import to_http_error
from cifarx_serve.server.api.routes import create_routes
from cifarx_serve.server.asgi import Application
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.inference.deadline import ThreadPool
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.settings import Settings
from cifarx_serve.system.cpus import set_cpu_limit

_SWITCH_INTERVAL_S: Final = 5e-4
"""How long a thread may keep the interpreter while another one waits for it; Python's default is 5 ms."""


def configure_process(settings: Settings) -> None:
    """Register the backends and set the number of threads of this process; call it before a model is opened."""
    for backend in settings.registered_backends:
        register_backend(*backend)
    set_cpu_limit(settings.threads)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def create_app(settings: Settings, access_log: AccessLog | None, worker: int = 0) -> Application:
    """Create the application in the event loop that will run it. Its models are not opened yet.

    Args:
        settings: the settings of the server.
        access_log: receives a line per request, unless it is None.
        worker: the number of this process among those that share their metrics.

    Raises:
        UsageError: the file of the API keys cannot be read, or as for `image_format.extra_formats`.
    """
    metrics = Metrics(worker)
    repository = ModelRepository(settings, metrics)
    api_keys = ApiKeys(Path(settings.api_key_file)) if settings.api_key_file else None
    decoder = ImageDecoder(settings.threads, settings.limits.max_pixels)
    routes = create_routes(repository, metrics, decoder, ThreadPool(settings.threads, "parse"))
    return Application(repository, metrics, routes, to_http_error, api_keys, access_log)
