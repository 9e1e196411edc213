"""Outputs of trained networks that the tests of one process share: the reference of a parity check takes a second."""

import hashlib
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_train.pytorch_backend import PyTorchBackend


class RememberedOutputs:
    """What the PyTorch backend has returned on the CPU, by the weights of a built-in network and the batch."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[str, bytes, bytes], NDArray[np.float32]] = {}
        self._weights: WeakKeyDictionary[PyTorchBackend, bytes] = WeakKeyDictionary()

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Let the backend run each batch once. Only for tests that do not look into the network."""
        run = PyTorchBackend.run

        def run_once(backend: PyTorchBackend, batch: NDArray[np.float32]) -> NDArray[np.float32]:
            if backend.spec.model != "lzh" or backend.provider != "cpu":
                return run(backend, batch)
            key = (str(batch.shape), self._weights_of(backend), hashlib.sha256(batch.tobytes()).digest())
            if key not in self._outputs:
                self._outputs[key] = run(backend, batch)
            return self._outputs[key].copy()

        patch.setattr(PyTorchBackend, "run", run_once)

    def _weights_of(self, backend: PyTorchBackend) -> bytes:
        if backend not in self._weights:
            digest = hashlib.sha256()
            for name, weight in backend.network.state_dict().items():
                digest.update(name.encode() + weight.numpy().tobytes())
            self._weights[backend] = digest.digest()
        return self._weights[backend]
