"""What a server is told: the files, the limits, the addresses."""

from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from cifarx_serve.backends.registry import RegisteredBackend
from cifarx_serve.errors import UsageError

SHARED_FIGURES: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable with the folder in which workers share what they count; read when metrics are imported."""

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker takes; past a limit the request is answered with an error, and the others are not disturbed.

    Attributes:
        max_batch: images that go through the model together.
        max_delay_us: how long the first image of a batch waits for others where the model is idle, in microseconds.
        max_queue: images that wait while the model is busy; past it 503.
        deadline_s: from a request's arrival to its answer; past it 504.
        max_body_bytes: of a request; past it 413.
        max_pixels: of one image, before it is decoded; past it 413. Of all of a request that a model resizes itself.
        max_images: of one request; past it 413.
        max_connections: open at a time; one that was quiet for a second makes room, else more wait to be accepted.
        header_timeout_s: for a request's head to arrive; past it the connection is closed.
        body_timeout_s: for its body; past it 408.
        keep_alive_s: between two requests of a connection.
    """

    max_batch: Count = 64
    max_delay_us: Annotated[int, Meta(ge=0)] = 0
    max_queue: Count = 256
    deadline_s: Seconds = 10.0
    max_body_bytes: Count = 32 * 2**20
    max_pixels: Count = 50_000_000
    max_images: Count = 64
    max_connections: Count = 1024
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    keep_alive_s: Seconds = 75.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker needs to know; it travels to the worker as JSON.

    Attributes:
        files: model files by the name they are served under, in order; the first answers where none is named.
        threads: CPUs that one worker computes with.
        registered: backends of the process that started the server.
        api_key_file: a key a line; without one everybody may ask.
        cors_origin: the origin whose pages may ask from a browser; None for none.
        certificate, private_key: files of TLS, both or none.
    """

    files: dict[str, str]
    backend: str | None = None
    device: str = "auto"
    threads: Count = 1
    registered: tuple[RegisteredBackend, ...] = ()
    limits: Limits = Limits()
    api_key_file: str | None = None
    cors_origin: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    access_log: bool = True


def served_names(paths: list[Path]) -> dict[str, str]:
    """Files by the names they are served under: without the suffix, with it where two would have one name.

    Raises:
        UsageError: no file, or one that is named twice.
    """
    if not paths:
        raise UsageError("no file to serve", "name at least one model file")
    if twice := [path for number, path in enumerate(paths) if path in paths[:number]]:
        raise UsageError(f"{twice[0]} is named twice", "name each file once")
    whole = [path.absolute().name for path in paths]  # of a folder too: the last of "." is empty
    stems = [name.rpartition(".")[0] or name for name in whole]
    names = [
        stem if stems.count(stem) == 1 else name.replace(".", "-") for stem, name in zip(stems, whole, strict=True)
    ]
    if len(set(names)) != len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names)]
    return dict(zip(names, (str(path.absolute()) for path in paths), strict=True))
