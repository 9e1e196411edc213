"""Measure what a server must do for each image, alone and in one thread: decode the image, and run the model.

usage: python bare_steps.py MODEL IMAGE BATCH
Prints the microseconds per image of both together, the best of several rounds.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.peers.peer_model import PeerModel

ROUNDS = 9
ROUND_S = 0.1


def main() -> None:
    path, image, batch = sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
    model = PeerModel(path, 1)
    images = np.repeat(model.decode(image)[None], batch, axis=0)
    decode_us = microseconds(lambda: model.decode(image))
    run_us = microseconds(lambda: model.session.run(["logits"], {"input": images})) / batch
    sys.stdout.write(f"{decode_us + run_us}\n")


def microseconds(step: Callable[[], object]) -> float:
    """Return the time of a step."""
    best = float("inf")
    for _ in range(ROUNDS):
        started, calls = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < ROUND_S:
            step()
            calls += 1
        best = min(best, passed / calls * 1e6)
    return best


if __name__ == "__main__":
    main()
