"""A minimal server: one process, one image per call, no batching, no checks.

usage: python bare_asgi_peer.py MODEL PORT [--threads N]
"""

import argparse
import json
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from benchmarks.peers.peer_model import PeerModel

HEADERS = [(b"content-type", b"application/json")]


def application(model: PeerModel) -> Callable[..., Awaitable[None]]:
    """Return an ASGI application that classifies the image in the body of each POST request."""

    async def answer(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        found = json.dumps(model.classify(model.decode(body)[None])[0]).encode() if body else b"{}"
        length = (b"content-length", str(len(found)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, length]})
        await send({"type": "http.response.body", "body": found})

    return answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    uvicorn.run(
        application(PeerModel(arguments.model, arguments.threads)),
        host="127.0.0.1",
        port=arguments.port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
