"""Closing a listening socket without losing a connection.

Between the last `accept` and the closing of the socket, the system may complete a handshake with another client, and
then answer its request with a reset. To prevent this, new handshakes are dropped for a while before the socket is
closed.
"""

import ctypes
import socket
import struct
from contextlib import suppress
from typing import Final

_SO_ATTACH_FILTER: Final = 26
"""The value on most architectures of Linux; the socket module does not define it."""

# Classic BPF on the TCP header, whose byte 13 holds the flags: drop segments with SYN (2) and without ACK (16).
_PROGRAM: Final = (
    (0x30, 0, 0, 13),  # load byte 13
    (0x54, 0, 0, 0x12),  # mask it with both flags
    (0x15, 0, 1, 0x02),  # if it is not SYN alone, skip the next instruction
    (0x06, 0, 0, 0),  # drop the segment
    (0x06, 0, 0, 0xFFFFFFFF),  # accept the segment
)


def drop_new_connections(listener: socket.socket) -> None:
    """Drop new TCP handshakes; those that have begun still finish, and their connections can be accepted.

    This holds for all processes that share the socket. The client tries again after a second, and is then refused or
    reaches the next server. On systems other than Linux, nothing happens.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _PROGRAM))
    with suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(_PROGRAM), ctypes.addressof(program))
        )
