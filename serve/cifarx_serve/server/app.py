"""The parts of one process that answers, put together; whatever accepts its connections."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from cifarx_serve.backends.registry import register_backend
from cifarx_serve.server.api.routes import Routes
from cifarx_serve.server.asgi import Application
from cifarx_serve.server.http.access_log import AccessLog
from cifarx_serve.server.http.api_keys import ApiKeys
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.settings import Settings
from cifarx_serve.system.cpus import share_cpus

_SWITCH_S: Final = 5e-4
"""A thread that has computed waits so long for the interpreter, where another has it; 5 ms are Python's own."""


class Composition(NamedTuple):
    """The models, not yet open, the ASGI application that answers with them, and what it counts."""

    service: ModelRepository
    application: Application
    metrics: Metrics


def prepare_process(settings: Settings) -> None:
    """What holds for a process as a whole; called before a model is opened."""
    for registered in settings.registered:
        register_backend(*registered)
    share_cpus(settings.threads)
    sys.setswitchinterval(_SWITCH_S)


def create_app(settings: Settings, log: AccessLog | None) -> Composition:
    """Put the parts together, in the event loop that will run them.

    Raises:
        UsageError: the API keys cannot be read.
    """
    metrics = Metrics()
    service = ModelRepository(settings, metrics)
    keys = ApiKeys(Path(settings.api_key_file)) if settings.api_key_file else None
    routes = Routes(service, metrics, ThreadPoolExecutor(settings.threads, "decode")).table()
    return Composition(service, Application(service, metrics, routes, keys, log), metrics)
