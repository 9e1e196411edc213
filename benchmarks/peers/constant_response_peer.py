"""A server that does nothing: it parses a request and answers every one with the same JSON.

usage: python constant_response_peer.py PORT PROCESSES BYTES
"""

import asyncio
import os
import socket
import sys
from typing import cast

import httptools
import uvloop


class ConstantResponse(asyncio.Protocol):
    """The protocol of one connection.

    Args:
        response: what it sends at the end of each request.
    """

    def __init__(self, response: bytes) -> None:
        self._response = response
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._transport.write(self._response)


async def serve(listener: socket.socket, response: bytes) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: ConstantResponse(response), sock=listener)
    await server.serve_forever()


def main() -> None:
    port, processes, size = map(int, sys.argv[1:])
    body = b'{"padding": "%b"}' % (b"." * (size - 15))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    listener = socket.create_server(("127.0.0.1", port), backlog=128)
    listener.setblocking(False)
    for _ in range(processes - 1):
        if not os.fork():
            break
    uvloop.run(serve(listener, head + body))


if __name__ == "__main__":
    main()
