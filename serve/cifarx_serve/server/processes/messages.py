"""The messages between the supervisor and its workers."""

from typing import Final

import msgspec

from cifarx_serve.server.settings import Settings

READY: Final = b"ready\n"
"""Sent by a worker when its models are open."""

ALIVE: Final = b"alive\n"
"""Sent by a worker that is ready, every `ALIVE_INTERVAL_S`, as long as its event loop runs."""

ALIVE_INTERVAL_S: Final = 1.0

ALL_READY: Final = b"all ready\n"
"""Sent by the supervisor to the first workers of a server when all of them are ready."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Sent by the supervisor to a worker that it has started.

    Attributes:
        settings: the settings of the server.
        number: the number of the worker, from 0. A worker that replaces another one has its number.
        listener_fd: the file descriptor of the listening socket.
        grpc_address: the numeric address and the port for gRPC, such as `127.0.0.1:8001`; None for no gRPC.
        status_fd: the file descriptor to which the worker writes `READY`, or an error as a JSON array of the problem
            and the remedy.
        accept_while_opening: whether to accept connections before the models are open, and answer that they are not.
    """

    settings: Settings
    number: int
    listener_fd: int
    status_fd: int
    accept_while_opening: bool
    grpc_address: str | None = None


class Update(msgspec.Struct, frozen=True, tag="update"):
    """Sent by the supervisor to a worker: serve these files, by key, and reply with `Updated`."""

    number: int
    files: dict[str, str]


class Updated(msgspec.Struct, frozen=True, tag="updated"):
    """Sent by a worker that has followed an `Update`. `errors` says why a model could not be loaded, by its key."""

    number: int
    errors: dict[str, str]
