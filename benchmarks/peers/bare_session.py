"""Measure `session.run` alone.

usage: python bare_session.py MODEL BATCH THREADS
For each number of seconds read from standard input, runs that long and prints the images per second.
"""

import sys
import time

import numpy as np

from benchmarks.peers.peer_model import PeerModel


def main() -> None:
    path, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    session = PeerModel(path, threads).session
    shape = (batch, *session.get_inputs()[0].shape[1:])
    images = np.random.default_rng(0).random(shape, np.float32)
    for line in sys.stdin:
        started, calls = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < float(line):
            session.run(["logits"], {"input": images})
            calls += 1
        sys.stdout.write(f"{calls * batch / passed}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
