"""BentoML with its adaptive batching on.

usage: python bentoml_peer.py MODEL PORT [--workers N] [--threads N] [--max-batch N] [--max-latency-ms N]

Also the service itself, which BentoML's own worker processes import: they read these options from the environment.
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
"""With what they are where nothing is said."""


def option(name: str) -> int:
    """An option, as `main` left it in the environment."""
    return int(os.environ.get(f"PEER_{name.upper()}", OPTIONS[name]))


def _raw(body: Any) -> Any:
    """A body that is an image file, as a list of one; BentoML batches lists."""
    return [bytes(body)] if isinstance(body, bytes | bytearray) else body


# The JSON schema says "string", so BentoML hands over the body as it came: its multipart form would cost it more.
Images = Annotated[list[bytes], BeforeValidator(_raw), WithJsonSchema({"type": "string", "format": "binary"})]


@bentoml.service(
    workers=option("workers"),
    traffic={"timeout": 30},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Classify:
    """Takes the raw body of an image file."""

    def __init__(self) -> None:
        self._model = PeerModel(os.environ["PEER_MODEL"], option("threads"))

    @bentoml.api(batchable=True, max_batch_size=option("max_batch"), max_latency_ms=option("max_latency_ms"))
    def classify(self, images: Images, /) -> list[dict[str, Any]]:
        """The best class of each image."""
        return self._model.classify(np.stack([self._model.decode(image) for image in images]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    asked = parser.parse_args()
    os.environ.update({f"PEER_{name.upper()}": str(value) for name, value in vars(asked).items()})
    os.environ.update(BENTOML_DO_NOT_TRACK="True", BENTOML_HOME=str(Path.cwd()))
    served = ["serve", f"{Path(__file__).stem}:Classify", "--host", "127.0.0.1", "--port", str(asked.port)]
    os.chdir(Path(__file__).parent)
    bento = Path(sys.executable).with_name("bentoml")
    os.execv(bento, [str(bento), *served])


if __name__ == "__main__":
    main()
