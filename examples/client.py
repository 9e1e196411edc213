"""Classify images with a running `cifarx serve`: as a form, as one file, and as a batch of tensors.

    cifarx serve lzh_9.onnx
    python examples/client.py dog.png cat.jpg --top-k 3

It needs requests, numpy and Pillow, but not cifarx.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import requests
from numpy.typing import NDArray
from PIL import Image, ImageOps

TIMEOUT_S = 30


class Candidate(TypedDict):
    """A class and its score, from 0 to 1."""

    label: str
    index: int
    score: float


class Prediction(TypedDict):
    """The best classes of an image, best first; or the reason why it cannot be read.

    A model with several labels per image also returns the `labels` that apply.
    """

    image: str | None
    top: NotRequired[list[Candidate]]
    labels: NotRequired[list[Candidate]]
    error: NotRequired[str]


class Client:
    """A connection to a server, which is kept open between requests."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session = requests.Session()

    def predict(self, images: Sequence[Path], top_k: int) -> list[Prediction]:
        """Classify several images with one request, a form, and return their predictions in order."""
        form = [("image", (path.name, path.read_bytes())) for path in images]
        response = self._post("/v1/predict", params={"top_k": top_k}, files=form)
        predictions: list[Prediction] = response.json()["predictions"]
        return predictions

    def predict_one(self, image: Path, top_k: int) -> Prediction:
        """Classify one image, whose file is the body of the request."""
        headers = {"Content-Type": "application/octet-stream"}
        response = self._post("/v1/predict", params={"top_k": top_k}, headers=headers, data=image.read_bytes())
        prediction: Prediction = response.json()["predictions"][0]
        return prediction

    def first_model(self) -> dict[str, Any]:
        """Return the name and the spec of the first model of the server."""
        response = _checked(self._session.get(f"{self._url}/v1/models", timeout=TIMEOUT_S))
        model: dict[str, Any] = response.json()["models"][0]
        return model

    def infer(self, model: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run a model on a batch over the Open Inference Protocol, with binary tensors in both directions.

        Args:
            model: the name of the model.
            pixels: uint8 (N, height, width, channels), at the input size of the model. The server normalizes them.

        Returns:
            The logits or probabilities, float32 (N, outputs).
        """
        tensor = {
            "name": "input",
            "datatype": "UINT8",
            "shape": pixels.shape,
            "parameters": {"binary_data_size": pixels.nbytes},
        }
        header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        length = {"Inference-Header-Content-Length": str(len(header))}
        response = self._post(f"/v2/models/{model}/infer", headers=length, data=header + pixels.tobytes())
        end = int(response.headers["Inference-Header-Content-Length"])
        shape = json.loads(response.content[:end])["outputs"][0]["shape"]
        return np.frombuffer(response.content[end:], "<f4").reshape(shape)

    def _post(self, path: str, **request: Any) -> requests.Response:
        return _checked(self._session.post(self._url + path, timeout=TIMEOUT_S, **request))


def _checked(response: requests.Response) -> requests.Response:
    """Return a successful response, or raise an exception with the error message of the server."""
    if not response.ok:
        raise requests.HTTPError(f"{response.status_code}: {response.json()['error']}", response=response)
    return response


def load_pixels(images: Sequence[Path], spec: dict[str, Any]) -> NDArray[np.uint8]:
    """Return images as RGB or grayscale pixels at the input size of a model, uint8 (N, height, width, channels).

    Raises:
        NotImplementedError: the model crops or pads its images, or resizes them without antialiasing.
    """
    taken = spec["input"]
    if taken["resize"] != "stretch" or taken["resize_to"] or not taken["antialias"]:
        raise NotImplementedError(
            "the model crops or pads its images, which this example does not do: send them to /v1/predict"
        )
    size, mode = (taken["width"], taken["height"]), "L" if taken["color"] == "L" else "RGB"
    resample = Image.Resampling[taken["interpolation"].upper()]
    opened = [ImageOps.exif_transpose(Image.open(path)).convert(mode) for path in images]
    pixels = np.stack([np.asarray(image.resize(size, resample)) for image in opened])
    return pixels.reshape(len(images), taken["height"], taken["width"], taken["channels"])


def labels_of(outputs: NDArray[np.float32], spec: dict[str, Any]) -> list[str]:
    """Return the label of each image, or all labels that apply, as one line of text."""
    names: list[str] = spec["class_names"]
    if spec["activation"] == "softmax":
        return [names[best] for best in outputs.argmax(axis=1)]
    scores = outputs if spec["output"] == "probabilities" else 1 / (1 + np.exp(-outputs))
    applicable = scores >= np.float32(spec["thresholds"] or 0.5)
    if spec["outputs"] == 1:
        return [names[int(row[0])] for row in applicable]
    return [_join([name for name, applies in zip(names, row, strict=True) if applies]) for row in applicable]


def _join(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "no label"


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify images with a running `cifarx serve`.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--top-k", type=int, default=1, help="number of classes to print per image")
    options = parser.parse_args()
    client = Client(options.url)

    print("as a form:")
    for prediction in client.predict(options.images, options.top_k):
        print(f"  {prediction['image']}: {_describe(prediction)}")

    print("as one file:")
    print(f"  {options.images[0].name}: {_describe(client.predict_one(options.images[0], options.top_k))}")

    print("as a batch of tensors:")
    model = client.first_model()
    outputs = client.infer(model["name"], load_pixels(options.images, model["spec"]))
    for path, labels in zip(options.images, labels_of(outputs, model["spec"]), strict=True):
        print(f"  {path.name}: {labels}")


def _describe(prediction: Prediction) -> str:
    """Return the labels that apply, if there can be several, or else the best classes."""
    if "error" in prediction:
        return f"error: {prediction['error']}"
    candidates = prediction["labels"] if "labels" in prediction else prediction["top"]
    return _join([f"{candidate['label']} {candidate['score']:.4f}" for candidate in candidates])


if __name__ == "__main__":
    try:
        main()
    except (requests.RequestException, OSError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
