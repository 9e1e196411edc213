"""Listens for gRPC calls, and drains them at the end."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from cifarx_serve.errors import CifarxError, UsageError, error_message
from cifarx_serve.server.grpc.handlers import Handlers
from cifarx_serve.server.grpc.sockets import drop_connections, has_connections, stop_listening
from cifarx_serve.server.settings import Settings

_MAX_STREAMS: Final = 4096
"""The maximum number of calls on one connection. gRPC resets further ones of a new client, which does not know the
limit yet. So it is far above `max_connections`, beyond which calls are answered with an error.
"""

_MAX_METADATA_BYTES: Final = 64 * 1024
"""The maximum size of the metadata of a call, as of the head of an HTTP request."""

_INT_MAX: Final = 2**31 - 1
"""The largest value of an option; gRPC takes it for no limit, and does not allow it for the number of connections."""

_KEEPALIVE_MS: Final = 60_000
"""How long a client may be silent before it is asked whether it is still there. Streams may be idle for hours."""

_MIN_PING_INTERVAL_MS: Final = 10_000
"""How often an idle client may ask the same; more often ends its connection."""

_MIN_CONNECTION_AGE_S: Final = 1.0

_AGE_SPREAD: Final = 1.1
"""How much older a connection can become: gRPC varies the age of each by a tenth."""

_HANDSHAKE_S: Final = 0.2
"""How long draining waits for handshakes of clients that already consider themselves connected: one round trip."""

_QUIET_S: Final = 0.5
"""Once no call has come for this long, the connections that are open are taken to be idle."""

_DRAIN_POLL_S: Final = 0.02


class GrpcServer:
    """Serves calls on a port that other processes may serve too. Use it in one event loop.

    A call that a client sends while gRPC shuts a server down is cancelled. So each connection is ended when it gets
    old, which gRPC does without loss: the client has to open another one, and the calls that it has sent are
    answered. A server that is drained accepts no connections, and waits until the old ones have ended.

    Args:
        handlers: handle the calls.
        settings: the limits and the TLS files.
        address: the numeric address and the port, such as `127.0.0.1:8001` or `[::1]:8001`.
    """

    def __init__(self, handlers: Handlers, settings: Settings, address: str) -> None:
        logging.getLogger("grpc").setLevel(logging.CRITICAL)  # the access log has the errors of clients
        self._handlers = handlers
        self._limits = settings.limits
        self._address = address
        self._port = int(address.rpartition(":")[2])
        self._credentials = _credentials(settings.certfile, settings.keyfile)
        self._connection_age_s = max(settings.limits.deadline_s, _MIN_CONNECTION_AGE_S)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen, and start to accept connections.

        Raises:
            CifarxError: the port cannot be listened on.
        """
        limits = self._limits
        server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", min(limits.max_body_bytes, _INT_MAX)),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
                ("grpc.max_allowed_incoming_connections", min(limits.max_connections, _INT_MAX - 1)),
                ("grpc.max_connection_age_ms", min(round(1000 * self._connection_age_s), _INT_MAX)),
                ("grpc.max_connection_age_grace_ms", _INT_MAX),  # calls that have begun go on
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
                ("grpc.server_handshake_timeout_ms", round(1000 * limits.header_timeout_s)),
            )
        )
        server.add_generic_rpc_handlers((self._handlers,))
        try:
            if self._credentials is None:
                server.add_insecure_port(self._address)
            else:
                server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            problem = f"cannot listen on {self._address} for gRPC ({error_message(error)})"
            raise CifarxError(problem, "choose another --grpc-port") from error
        await server.start()
        self._server = server

    async def drain(self) -> None:
        """Accept the connections in the queue of the port, answer all calls, and close all connections.

        This takes no longer than the deadline and the timeout of a message together.
        """
        if self._server is None:
            return
        end = time.perf_counter() + self._limits.deadline_s + self._limits.body_timeout_s
        self._handlers.draining.set()
        drop_connections(self._port)
        await asyncio.sleep(_HANDSHAKE_S)
        stop_listening(self._port)
        oldest_end = min(end, time.perf_counter() + self._connection_age_s * _AGE_SPREAD + _QUIET_S)
        while time.perf_counter() < oldest_end and not self._is_quiet() and has_connections(self._port):
            await asyncio.sleep(_DRAIN_POLL_S)
        await self._server.stop(max(0.0, end - time.perf_counter()))

    def _is_quiet(self) -> bool:
        """Return whether there are no calls, and have not been any for a while."""
        return not self._handlers.active and time.perf_counter() - self._handlers.last_active_at > _QUIET_S


def _credentials(certfile: str | None, keyfile: str | None) -> "grpc.ServerCredentials | None":
    if certfile is None or keyfile is None:
        return None
    try:
        pair = (Path(keyfile).read_bytes(), Path(certfile).read_bytes())
    except OSError as error:
        problem = f"cannot read {certfile} and {keyfile} ({error_message(error)})"
        raise UsageError(problem, "give a PEM certificate and its key") from error
    return grpc.ssl_server_credentials((pair,))
