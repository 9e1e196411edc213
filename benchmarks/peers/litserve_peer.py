"""LitServe with batching.

usage: python litserve_peer.py MODEL PORT [--workers N] [--api-servers N] [--threads N] [--max-batch N]
           [--batch-timeout-ms X] [--fast-queue]
"""

import argparse
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body
from numpy.typing import NDArray

from benchmarks.peers.peer_model import PeerModel


class Classify(litserve.LitAPI):
    """Classifies the image file in the request body, which is cheaper for LitServe than JSON or a form."""

    def __init__(self, path: str, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self._path, self._threads = path, threads

    def setup(self, device: str) -> None:  # noqa: ARG002
        self._model = PeerModel(self._path, self._threads)

    def decode_request(self, request: Annotated[bytes, Body()]) -> NDArray[np.float32]:
        return self._model.decode(request)

    def batch(self, inputs: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.stack(inputs)

    def predict(self, x: NDArray[np.float32]) -> list[dict[str, Any]]:
        return self._model.classify(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--api-servers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--batch-timeout-ms", type=float, default=1.0)
    parser.add_argument("--fast-queue", action="store_true")
    arguments = parser.parse_args()
    api = Classify(
        arguments.model,
        arguments.threads,
        max_batch_size=arguments.max_batch,
        batch_timeout=arguments.batch_timeout_ms / 1e3,
    )
    server = litserve.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=arguments.workers, fast_queue=arguments.fast_queue
    )
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=arguments.api_servers,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
