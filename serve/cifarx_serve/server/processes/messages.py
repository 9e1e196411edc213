"""What the supervisor and its workers tell each other."""

from typing import Final

import msgspec

from cifarx_serve.server.settings import Settings

READY: Final = b"ready\n"
"""From a worker: its models answer."""

ALL_READY: Final = b"all ready\n"
"""What the supervisor tells the first workers of a server, those that accept at once, when none is missing."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor tells a worker.

    Attributes:
        settings: the server's.
        listener: the number of the file of the listening socket.
        status: the number of the file where `READY` is written to, or why it cannot be: problem and remedy as JSON.
        at_once: whether to accept connections before the models are open, to say that they are not.
    """

    settings: Settings
    listener: int
    status: int
    at_once: bool
