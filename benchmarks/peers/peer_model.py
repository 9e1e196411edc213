"""What every peer does with an image: the arithmetic of `cifarx_serve.images.preprocess`, in plain numpy.

The peers run in an environment without cifarx, so nothing is imported from it.
"""

import io
import json
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class PeerModel:
    """An ONNX file of `cifarx export`, run by a session with a number of threads."""

    def __init__(self, path: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        spec = json.loads(self.session.get_modelmeta().custom_metadata_map["cifarx.spec"])
        self._names, taken = spec["class_names"], spec["input"]
        self._size = (taken["width"], taken["height"])
        self._filter = FILTERS[taken["interpolation"]]
        self._range = taken["value_range"]
        self._mean, self._std = (np.asarray(taken[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
        self._normalized = bool(self._mean.any() or (self._std != 1).any())

    def decode(self, body: bytes) -> NDArray[np.float32]:
        """Return an image file as the input of the network, float32 (3, height, width)."""
        with Image.open(io.BytesIO(body)) as opened:
            image = opened.convert("RGB")
        if image.size != self._size:
            image = image.resize(self._size, self._filter)
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32)
        pixels /= 255
        low, high = self._range
        if (low, high) != (0, 1):
            pixels = pixels * np.float32(high - low) + np.float32(low)
        if self._normalized:
            pixels = (pixels - self._mean) / self._std
        return pixels

    def classify(self, batch: NDArray[np.float32]) -> list[dict[str, Any]]:
        """Return the best class of each image of a batch (N, 3, height, width)."""
        logits = self.session.run(["logits"], {"input": batch})[0]
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        best = logits.argmax(axis=1)
        rows = zip(best.tolist(), scores[np.arange(len(best)), best].tolist(), strict=True)
        return [{"label": self._names[index], "index": index, "score": score} for index, score in rows]
