"""BentoML with adaptive batching.

usage: python bentoml_peer.py MODEL PORT [--workers N] [--threads N] [--max-batch N] [--max-latency-ms N]

The worker processes of BentoML import this module and read the options from the environment.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import bentoml
import numpy as np
from pydantic import BeforeValidator, WithJsonSchema

from benchmarks.peers.peer_model import PeerModel

OPTIONS = {"workers": 1, "threads": 1, "max_batch": 64, "max_latency_ms": 1000}
"""Options and their defaults."""


def option(name: str) -> int:
    """Return an option that `main` set in the environment."""
    return int(os.environ.get(f"PEER_{name.upper()}", OPTIONS[name]))


def _raw(body: Any) -> Any:
    """Wrap the bytes of an image file in a list, because BentoML batches lists."""
    return [bytes(body)] if isinstance(body, bytes | bytearray) else body


# With the JSON schema "string", BentoML passes the raw body, which is cheaper for it than its multipart form.
Images = Annotated[list[bytes], BeforeValidator(_raw), WithJsonSchema({"type": "string", "format": "binary"})]


@bentoml.service(
    workers=option("workers"),
    traffic={"timeout": 30},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Classify:
    """Classifies the image file in the request body."""

    def __init__(self) -> None:
        self._model = PeerModel(os.environ["PEER_MODEL"], option("threads"))

    @bentoml.api(batchable=True, max_batch_size=option("max_batch"), max_latency_ms=option("max_latency_ms"))
    def classify(self, images: Images, /) -> list[dict[str, Any]]:
        """Return the best class of each image."""
        return self._model.classify(np.stack([self._model.decode(image) for image in images]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    arguments = parser.parse_args()
    os.environ.update({f"PEER_{name.upper()}": str(value) for name, value in vars(arguments).items()})
    os.environ.update(BENTOML_DO_NOT_TRACK="True", BENTOML_HOME=str(Path.cwd()))
    served = ["serve", f"{Path(__file__).stem}:Classify", "--host", "127.0.0.1", "--port", str(arguments.port)]
    os.chdir(Path(__file__).parent)
    bento = Path(sys.executable).with_name("bentoml")
    os.execv(bento, [str(bento), *served])


if __name__ == "__main__":
    main()
