"""The end of a listening socket without the loss of a connection.

Between the last look at the system's queue and the closing of the socket another client may be told that it is
connected; what it then sends is answered by a reset. So no more clients are let in a while before the end.
"""

import ctypes
import socket
import struct
from contextlib import suppress
from typing import Final

_ATTACH_FILTER: Final = 26
"""Linux's SO_ATTACH_FILTER, on most of its architectures; the socket module has no name for it."""

# Classic BPF on the TCP header, which byte 13 holds the flags of: what has SYN (2) without ACK (16) is dropped.
_PROGRAM: Final = (
    (0x30, 0, 0, 13),  # load the byte
    (0x54, 0, 0, 0x12),  # and with both flags
    (0x15, 0, 1, 0x02),  # SYN alone? else pass over the next
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # let in
)


def refuse_handshakes(listener: socket.socket) -> None:
    """Let nobody begin to connect any more; those that have begun get through, and wait to be accepted.

    For every process that has the socket. A client that comes now tries again after a second, and is refused then, or
    finds the next server. Where the system cannot do it, nothing is changed.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _PROGRAM))
    with suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HL", len(_PROGRAM), ctypes.addressof(program))
        )
