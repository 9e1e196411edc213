import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.backends.base import Backend
from cifarx_serve.devices import Device
from cifarx_serve.errors import ImageError, ModelFileError, UsageError
from cifarx_serve.predictor import Prediction, Predictor, load
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_serve.system.cpus import available_cpus
from tests.support.child_processes import running_children
from tests.support.color_model import SPEC, write_onnx, write_relative_onnx
from tests.support.predictions import require_predictions
from tests.support.spec_model import BGR, GRAYSCALE, RGB, make_spec, write_model
from tests.support.trained_model import Trained

RED, GREEN, BLUE, CYAN, GRAY = (
    Image.new("RGB", (9, 5), color) for color in ("red", "lime", "blue", "cyan", (77, 77, 77))
)


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    return load(write_onnx(tmp_path / "colors.onnx"), device="cpu")


class Unseekable(io.RawIOBase):
    """A raw stream that cannot seek, and returns less than it is asked for, as a pipe does."""

    def __init__(self, content: bytes) -> None:
        self._rest = content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(7, len(self._rest), len(buffer))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


class ConstantBackend(Backend):
    """A backend that returns the same logits for every image, and counts how often it is closed."""

    name = "constant"
    suffixes = (".constant",)

    def __init__(self, path: Path, device: Device) -> None:
        del path, device
        self.spec, self.provider, self.closed = SPEC, "none", 0
        self.logits = [0.0, 0.0, 0.0]

    @classmethod
    def read_spec(cls, path: Path) -> ModelSpec:
        raise NotImplementedError(path)

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.array([self.logits] * len(batch), np.float32)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def constant() -> ConstantBackend:
    return ConstantBackend(Path("x.constant"), Device("cpu"))


def test_predicts_colors(predictor: Predictor) -> None:
    for index, (image, label) in enumerate([(RED, "red"), (GREEN, "green"), (BLUE, "blue")]):
        prediction = predictor.predict(image)
        assert (prediction.label, prediction.index) == (label, index)
        assert prediction.score == pytest.approx(np.exp(10) / (np.exp(10) + 2))
        assert [candidate.label for candidate in prediction.top] == [label]


def test_properties_describe_the_model(predictor: Predictor) -> None:
    assert predictor.spec == SPEC
    assert predictor.backend == "onnxruntime"
    assert predictor.provider == "CPUExecutionProvider"


def test_top_k_is_sorted_best_first(predictor: Predictor) -> None:
    prediction = predictor.predict(Image.new("RGB", (3, 3), (10, 200, 100)), top_k=3)
    assert [(candidate.label, candidate.index) for candidate in prediction.top] == [
        ("green", 1),
        ("blue", 2),
        ("red", 0),
    ]
    scores = [candidate.score for candidate in prediction.top]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1)
    assert (prediction.label, prediction.index, prediction.score) == ("green", 1, scores[0])


def test_ties_select_the_first_class_as_argmax_does(predictor: Predictor) -> None:
    gray, cyan = require_predictions(predictor.predict([GRAY, CYAN], top_k=3))
    assert [candidate.index for candidate in gray.top] == [0, 1, 2]
    assert [candidate.index for candidate in cyan.top] == [1, 2, 0]


@given(
    logits=st.lists(st.sampled_from([-1000.0, -900.0, 0.0, 1e-30, 0.5, 3.0]), min_size=3, max_size=3),
    top_k=st.integers(1, 3),
)
def test_the_label_is_the_argmax_of_the_logits(logits: list[float], top_k: int) -> None:
    backend = ConstantBackend(Path("x.constant"), Device("cpu"))
    backend.logits = logits
    prediction = Predictor(backend).predict(RED, top_k)
    assert prediction.index == int(np.argmax(logits))
    assert len(prediction.top) == top_k
    assert [logits[candidate.index] for candidate in prediction.top] == sorted(logits, reverse=True)[:top_k]
    assert all(candidate.label == SPEC.class_names[candidate.index] for candidate in prediction.top)


@pytest.mark.parametrize("top_k", [0, -1, 4])
def test_top_k_out_of_range_is_a_usage_error(predictor: Predictor, top_k: int) -> None:
    for images in ([RED], []):
        with pytest.raises(UsageError) as raised:
            predictor.predict(images, top_k)
        assert raised.value.problem == f"top-k is {top_k}"
        assert "give 1 to 3" in raised.value.remedy


def test_every_kind_of_source_has_the_same_prediction(predictor: Predictor, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    with Image.open(path) as opened, path.open("rb") as file, path.open("rb", buffering=0) as unbuffered:
        at_the_end = io.BytesIO(content)
        at_the_end.seek(0, io.SEEK_END)
        contents: list[Any] = [content, bytearray(content), memoryview(content), at_the_end, file, unbuffered]
        files = [path, str(path), io.BufferedReader(Unseekable(content)), Unseekable(content)]
        sources: list[Any] = [*contents, *files, pixels, Image.fromarray(pixels), opened]
        predictions = predictor.predict(sources, top_k=3)
        assert not file.closed
    assert predictions == [predictions[0]] * len(sources)
    assert predictor.predict(path, top_k=3) == predictions[0]


def test_takes_one_image_or_several(predictor: Predictor, tmp_path: Path) -> None:
    single = predictor.predict(RED, top_k=2)
    assert predictor.predict([RED], 2) == predictor.predict((RED,), top_k=2) == [single]
    assert predictor.predict((image for image in [RED, RED]), 2) == [single] * 2
    RED.save(tmp_path / "red.png")
    assert predictor.predict(np.array([str(tmp_path / "red.png")] * 2), 2) == [single] * 2
    assert predictor.predict(np.array([RED, None], object), 2)[0] == single


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 4), (5, 7, 1)])
@pytest.mark.parametrize("count", [1, 3, 70])
def test_an_array_of_images_equals_a_list_of_them(
    predictor: Predictor, shape: tuple[int, int, int], count: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    found: Any = predictor.predict(pixels, 3)
    assert found == predictor.predict(list(pixels), 3)
    assert found[-1].top == pytest.approx(predictor.predict(pixels[-1], 3).top)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 6, 3), np.float32), np.zeros((2, 3, 4, 6), np.uint8), np.zeros((2, 4, 6, 2), np.uint8)],
    ids=lambda images: f"{images.dtype} {images.shape}",
)
def test_an_array_that_cannot_be_images_is_refused_as_a_whole(predictor: Predictor, images: Any) -> None:
    with pytest.raises(ImageError, match=r"cannot take an array of shape .*: give uint8 of shape \(N, H, W, 1\)"):
        predictor.predict(images)


class Tensor:
    """What a tensor of PyTorch has: it is iterable, and more than a list."""

    ndim = 3

    def __array__(self) -> NDArray[np.uint8]:
        return np.zeros((3, 4, 6), np.uint8)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return iter(self.__array__())


class Broken(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        raise OSError("the connection was lost")

    def read(self, size: int = -1, /) -> bytes:
        raise OSError(f"no {size} bytes: the connection was lost")


BAD_IMAGES: list[tuple[Any, str]] = [
    (None, "None is not an image: give a path"),
    (3.5, "float is not an image: give a path"),
    ({"bytes": b""}, "dict is not an image: give a path"),
    (Tensor(), r"Tensor is not an image: give a uint8 array of shape \(H, W, 3\), such as tensor.permute"),
    (np.zeros((4, 6, 3), np.float32), r"cannot take an array of shape \(4, 6, 3\) and dtype float32"),
    (np.zeros((4, 6), bool), "dtype bool"),
    (np.zeros((3, 4, 6), np.uint8), r"shape \(3, 4, 6\)"),
    (np.zeros((0, 6, 3), np.uint8), r"the image is empty \(6x0 pixels\)"),
    (np.zeros(9, np.uint8), r"shape \(9,\)"),
    (b"not an image", "12 bytes is not an image"),
    (io.BytesIO(b"not an image"), "a file object of 12 bytes is not an image"),
    (io.StringIO("text"), r"cannot read the file object .*: open it in binary mode"),
    (Broken(), r"cannot read the file object \(no \d+ bytes: the connection was lost\): open it again"),
    ("https://example.org/dog.jpg?size=1", r"dog.jpg\?size=1 is a URL, and cifarx does not download: save it"),
    ("s3://bucket/dog.jpg", "s3://bucket/dog.jpg is a URL, and cifarx does not download: save it to a file first"),
    ("data:image/png;base64,iVBORw0KGgo=", "cifarx does not download: decode the base64 text"),
    ("file:///tmp/dog.jpg", "cifarx does not download: give its path"),
    ("nul\0.png", "cannot open image"),
    ("\ud800.png", "cannot open image"),
    ("absent.png", r"absent\.png"),
]


@pytest.mark.parametrize(("image", "problem"), BAD_IMAGES, ids=range(len(BAD_IMAGES)))
def test_what_is_no_image_is_an_image_error(predictor: Predictor, image: Any, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        predictor.predict(image)


@pytest.mark.parametrize("length", [1, 20])
def test_what_is_no_image_is_an_error_in_its_place_of_a_list(predictor: Predictor, length: int) -> None:
    images = [image for bad, _ in BAD_IMAGES for image in (RED, bad)] * length
    for found in (predictor.predict(images, logits=True), list(predictor.predict_stream(images))):
        assert [type(entry) for entry in found] == [Prediction, ImageError] * (len(images) // 2)


def test_a_long_list_equals_single_predictions(predictor: Predictor) -> None:
    images = [RED, GREEN, BLUE, CYAN] * 40
    single = {id(image): predictor.predict(image, 2, logits=True) for image in images[:4]}
    assert predictor.predict(iter(images), 2, logits=True) == [single[id(image)] for image in images]


@pytest.mark.slow
def test_a_long_list_takes_no_more_memory_than_a_stream(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    """As float32, the images take 1.2 GB."""
    model = write_model(tmp_path / "means.onnx", make_spec(InputSpec(height=224, width=224)))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 260)).save(tmp_path / "image.jpg")
    code = (
        "import resource, sys\n"
        "from cifarx_serve.predictor import load\n"
        "predictor = load(sys.argv[1], device='cpu')\n"
        "found = getattr(predictor, sys.argv[2])([sys.argv[3]] * 2000)\n"
        "assert len(list(found)) == 2000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    as_list, as_stream = (
        int(fresh_python(code, model, method, tmp_path / "image.jpg")) for method in ("predict", "predict_stream")
    )
    assert as_list <= 1.3 * as_stream


def test_a_pickled_predictor_opens_its_file_again(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    """The path is relative, and the other process is in another folder. Predictions and errors are pickled, too."""
    write_onnx(tmp_path / "colors.onnx")
    code = (
        "import copy, multiprocessing, os, sys\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "import numpy as np\n"
        "from cifarx_serve.predictor import load\n"
        "predictor = load('colors.onnx', 'onnxruntime', 'cpu')\n"
        "os.chdir('/')\n"
        "images = [np.full((5, 9, 3), (255, 0, 0), np.uint8), 'absent.png']\n"
        "with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:\n"
        "    found, error = pool.submit(predictor.predict, images).result()\n"
        "assert found == predictor.predict(images[0])\n"
        "other = copy.deepcopy(predictor)\n"
        "predictor.close()\n"
        "assert other.predict(images[0]) == found\n"
        "print(found.label, repr(error))"
    )
    assert fresh_python(code) == (
        "red ImageError('cannot open image absent.png (No such file or directory)', 'check the path')"
    )


def test_a_predictor_without_a_path_says_why_it_cannot_be_pickled(constant: ConstantBackend) -> None:
    with pytest.raises(UsageError, match=r"cannot be pickled: it has no path: open a model file with `cifarx\.load`"):
        pickle.dumps(Predictor(constant))


def test_returns_logits_on_request(predictor: Predictor) -> None:
    gray, cyan = require_predictions(predictor.predict([GRAY, CYAN], logits=True))
    assert gray.logits == pytest.approx([10 * 77 / 255] * 3)
    assert cyan.logits == pytest.approx([0, 10, 10])
    assert predictor.predict(CYAN).logits is None
    assert b"logits" not in msgspec.json.encode(predictor.predict(CYAN))


def test_an_array_of_the_input_size_is_predicted_like_any_image(predictor: Predictor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    before = pixels.copy()
    assert predictor.predict(pixels, logits=True) == predictor.predict(Image.fromarray(pixels), logits=True)
    assert np.array_equal(pixels, before)


def test_run_returns_the_logits_of_a_batch(predictor: Predictor) -> None:
    batch = np.random.default_rng(0).random((5, 3, 4, 6), dtype=np.float32)
    assert predictor.run(batch) == pytest.approx(10 * batch.mean((2, 3)), abs=1e-5)


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 3, 6, 4), np.float32),
        np.zeros((3, 4, 6), np.float32),
        np.zeros((0, 3, 4, 6), np.float32),
        np.zeros((1, 3, 4, 6), np.float64),
        np.zeros((1, 4, 6, 3), np.uint8),
    ],
    ids=lambda batch: f"{batch.dtype} {batch.shape}",
)
def test_run_refuses_a_batch_of_a_wrong_shape_or_dtype(predictor: Predictor, batch: NDArray[Any]) -> None:
    with pytest.raises(UsageError, match=r"the model takes float32 \(N, 3, 4, 6\)"):
        predictor.run(batch)


def test_images_of_different_sizes_keep_their_order(predictor: Predictor) -> None:
    images = [
        image.resize(size) for image, size in [(BLUE, (1, 1)), (RED, (300, 2)), (GREEN, (6, 4)), (BLUE, (64, 64))]
    ]
    assert [prediction.label for prediction in require_predictions(predictor.predict(images))] == [
        "blue",
        "red",
        "green",
        "blue",
    ]


def open_model(tmp_path: Path, spec: ModelSpec) -> Predictor:
    return load(write_model(tmp_path / "means.onnx", spec), device="cpu")


@pytest.mark.parametrize("color", [RGB, BGR])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_network_gets_its_own_order_of_channels_and_axes(tmp_path: Path, color: InputSpec, layout: Any) -> None:
    spec = make_spec(msgspec.structs.replace(color, layout=layout))
    expected = [10, 0, -10] if spec.input.color == "RGB" else [0, -10, 10]
    assert open_model(tmp_path, spec).predict(RED, logits=True).logits == pytest.approx(expected)


def test_a_grayscale_network_gets_the_luma(tmp_path: Path) -> None:
    predictor = open_model(tmp_path, make_spec(GRAYSCALE))
    luma = np.asarray(GREEN.convert("L"))[0, 0] / 255
    assert predictor.predict(GREEN, logits=True).logits == pytest.approx([10 * luma, 0, -10 * luma])


def test_a_grayscale_network_takes_arrays_of_each_shape(tmp_path: Path) -> None:
    predictor = open_model(tmp_path, make_spec(GRAYSCALE))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 1), dtype=np.uint8)
    sources: list[Any] = [pixels, pixels[..., 0], np.repeat(pixels, 3, axis=2), Image.fromarray(pixels[..., 0])]
    predictions = require_predictions(predictor.predict(sources, logits=True))
    assert predictions == [predictions[0]] * 4
    assert predictions[0].logits == pytest.approx([pixels.mean() / 25.5, 0, -pixels.mean() / 25.5], abs=1e-5)


@pytest.mark.parametrize("input_spec", [RGB, GRAYSCALE])
def test_embedded_preprocessing_takes_whole_images_of_the_right_channels(tmp_path: Path, input_spec: InputSpec) -> None:
    predictor = open_model(tmp_path, make_spec(input_spec, embedded_preprocessing=True))
    plain = open_model(tmp_path, make_spec(input_spec))
    expected = plain.predict(GREEN, logits=True).logits
    assert predictor.predict(GREEN, logits=True).logits == pytest.approx(expected, abs=1e-4)


def test_an_array_of_the_input_size_is_cropped_like_any_image(tmp_path: Path) -> None:
    cropped = InputSpec(height=4, width=4, resize="shorter_side", resize_to=8)
    predictor = open_model(tmp_path, make_spec(cropped))
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[1:3, 1:3] = (255, 0, 0)
    logits = predictor.predict(pixels, logits=True).logits
    assert logits == predictor.predict(Image.fromarray(pixels), logits=True).logits
    assert logits is not None
    assert logits[0] > 5  # the crop is the red center, enlarged


def test_a_long_stream_of_grayscale_files_equals_single_predictions(tmp_path: Path) -> None:
    letterbox = msgspec.structs.replace(GRAYSCALE, resize="letterbox", fill=114)
    predictor = open_model(tmp_path, make_spec(letterbox))
    paths = []
    for number, image in enumerate((RED, GREEN, BLUE, CYAN)):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    expected = [predictor.predict(path, top_k=3) for path in paths]
    assert list(predictor.predict_stream(paths * 300, top_k=3)) == expected * 300


def test_a_model_that_returns_probabilities_needs_no_activation(tmp_path: Path) -> None:
    predictor = open_model(tmp_path, make_spec(output="probabilities"))
    prediction = predictor.predict(RED, top_k=3)
    logits = np.array([10, 0, -10])
    scores = np.exp(logits) / np.exp(logits).sum()
    assert [candidate.score for candidate in prediction.top] == pytest.approx(scores.tolist(), abs=1e-6)
    assert prediction.labels is None
    with pytest.raises(UsageError, match="the model returns probabilities"):
        predictor.predict(RED, logits=True)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_temperature_calibrates_the_scores_and_decides_nothing(tmp_path: Path, activation: Any) -> None:
    plain = open_model(tmp_path, make_spec(activation=activation)).predict(RED, top_k=3)
    calibrated = open_model(tmp_path, make_spec(activation=activation, temperature=10.0)).predict(RED, top_k=3)
    exponentials = np.exp([1.0, 0, -1])
    scores = exponentials / (exponentials.sum() if activation == "softmax" else 1 + exponentials)
    assert [candidate.score for candidate in calibrated.top] == pytest.approx(scores.tolist(), abs=1e-6)
    assert [candidate.label for candidate in calibrated.top] == [candidate.label for candidate in plain.top]
    before, after = (prediction.labels or () for prediction in (plain, calibrated))
    assert [candidate.label for candidate in after] == [candidate.label for candidate in before]


@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_several_labels_apply_to_an_image(tmp_path: Path, output: str) -> None:
    spec = make_spec(output=output, activation="sigmoid", thresholds=(0.5, 0.5, 0.0))
    prediction = open_model(tmp_path, spec).predict(RED, top_k=2)
    scores = 1 / (1 + np.exp([-10, 0, 10]))
    assert prediction.labels is not None
    assert [candidate.label for candidate in prediction.labels] == ["red", "green", "blue"]
    assert [candidate.score for candidate in prediction.labels] == pytest.approx(scores.tolist(), abs=1e-6)
    assert [candidate.label for candidate in prediction.top] == ["red", "green"]
    assert (prediction.label, prediction.index, prediction.score) == ("red", 0, prediction.top[0].score)


def test_no_label_may_apply_to_an_image(tmp_path: Path) -> None:
    predictor = open_model(tmp_path, make_spec(activation="sigmoid", thresholds=(1, 0.9, 0.6)))
    prediction = predictor.predict(GRAY)
    assert (prediction.label, prediction.labels) == ("red", ())
    assert prediction.score == pytest.approx(0.5)
    assert msgspec.json.decode(msgspec.json.encode(prediction))["labels"] == []
    assert b"labels" not in msgspec.json.encode(open_model(tmp_path, make_spec()).predict(CYAN))


@pytest.mark.parametrize(("threshold", "label"), [(None, "no"), (0.2, "yes"), (0.3, "no")])
def test_one_output_decides_between_two_classes(tmp_path: Path, threshold: float | None, label: str) -> None:
    spec = make_spec(
        class_names=("no", "yes"),
        activation="sigmoid",
        outputs=1,
        thresholds=None if threshold is None else (threshold,),
    )
    image = Image.new("RGB", (6, 4), (100, 125, 0))  # the logit is -25 / 25.5
    prediction = open_model(tmp_path, spec).predict(image, top_k=2, logits=True)
    score = 1 / (1 + np.exp(25 / 25.5))
    assert prediction.label == label
    assert prediction.top[0].label == label
    assert {found.label: found.score for found in prediction.top} == pytest.approx({"yes": score, "no": 1 - score})
    assert prediction.logits == pytest.approx([-25 / 25.5])
    assert prediction.labels is None


@pytest.mark.parametrize(
    ("spec", "wanted", "valid"),
    [
        (make_spec(GRAYSCALE), r"float32 \(N, 1, 4, 6\)", np.zeros((2, 1, 4, 6), np.float32)),
        (
            make_spec(msgspec.structs.replace(RGB, layout="NHWC")),
            r"float32 \(N, 4, 6, 3\)",
            np.zeros((2, 4, 6, 3), np.float32),
        ),
        (
            make_spec(GRAYSCALE, embedded_preprocessing=True),
            r"uint8 \(N, H, W, 1\)",
            np.zeros((2, 9, 7, 1), np.uint8),
        ),
        (
            make_spec(class_names=("no", "yes"), activation="sigmoid", outputs=1),
            r"float32 \(N, 3, 4, 6\)",
            np.zeros((2, 3, 4, 6), np.float32),
        ),
    ],
    ids=["grayscale", "NHWC", "embedded grayscale", "one output"],
)
def test_run_takes_batches_as_the_spec_says(tmp_path: Path, spec: ModelSpec, wanted: str, valid: NDArray[Any]) -> None:
    predictor = open_model(tmp_path, spec)
    assert predictor.run(valid).shape == (2, spec.output_size)
    for wrong in (valid.transpose(0, 3, 1, 2), valid[0], valid[:0], valid.astype(np.float64)):
        with pytest.raises(UsageError, match=f"the model takes {wanted}"):
            predictor.run(wrong)


@pytest.mark.parametrize(
    ("stated", "real", "problem"),
    [
        (make_spec(GRAYSCALE), make_spec(), r"input float32 \(batch, 3, 4, 6\) .* \(batch, 1, 4, 6\)"),
        (make_spec(msgspec.structs.replace(RGB, layout="NHWC")), make_spec(), r"describes .* \(batch, 4, 6, 3\)"),
        (make_spec(embedded_preprocessing=True), make_spec(), "describes input uint8"),
        (make_spec(output="probabilities"), make_spec(), r"and logits float32 .* describes .* and probabilities"),
        (make_spec(class_names=("a", "b")), make_spec(), r"logits float32 \(batch, 3\).* logits float32 \(batch, 2\)"),
    ],
    ids=["channels", "layout", "dtype", "name of the output", "number of outputs"],
)
def test_a_file_whose_spec_describes_other_tensors_is_refused(
    tmp_path: Path, stated: ModelSpec, real: ModelSpec, problem: str
) -> None:
    path = write_model(tmp_path / "means.onnx", real, document=stated.to_json())
    with pytest.raises(ModelFileError, match=rf"means\.onnx has .*{problem}"):
        load(path, device="cpu")


@pytest.mark.parametrize("outputs", [2, 4])
def test_an_output_of_another_size_than_the_spec_is_refused(constant: ConstantBackend, outputs: int) -> None:
    """A format may not describe its tensors."""
    constant.logits = [0.0] * outputs
    for images in ([RED], [RED, GREEN]):
        with pytest.raises(ModelFileError, match=rf"the model returns logits of shape \({len(images)}, {outputs}\)"):
            Predictor(constant).predict(images)


class EmbeddedBackend(ConstantBackend):
    """A backend with embedded preprocessing; its logits are the mean color of the pixels."""

    def __init__(self, path: Path, device: Device) -> None:
        super().__init__(path, device)
        self.spec = msgspec.structs.replace(SPEC, embedded_preprocessing=True)
        self.batches: list[NDArray[np.uint8]] = []

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        self.batches.append(batch)
        return np.asarray(batch.mean((1, 2), np.float32))


def test_a_model_with_embedded_preprocessing_gets_the_original_pixels() -> None:
    backend = EmbeddedBackend(Path("x.constant"), Device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Predictor(backend).predict(pixels)
    [batch] = backend.batches
    assert batch.dtype == np.uint8
    assert np.array_equal(batch, pixels[None])


def test_embedded_preprocessing_batches_images_of_equal_size_and_keeps_their_order() -> None:
    backend = EmbeddedBackend(Path("x.constant"), Device("cpu"))
    sizes = [(9, 5), (5, 9), (9, 5), (1, 1), (5, 9), (9, 5)]
    names = ["blue", "red", "green", "blue", "red", "red"]
    images = [
        Image.new("RGB", size, {"green": "lime"}.get(name, name)) for size, name in zip(sizes, names, strict=True)
    ]
    assert [found.label for found in require_predictions(Predictor(backend).predict(images))] == names
    assert [batch.shape for batch in backend.batches] == [(3, 5, 9, 3), (2, 9, 5, 3), (1, 1, 1, 3)]


def test_a_stream_equals_single_predictions_and_yields_errors(predictor: Predictor, tmp_path: Path) -> None:
    """The stream has more images than fit into one batch or are decoded ahead."""
    (tmp_path / "broken.png").write_bytes(b"not an image")
    colors: list[Image.Image | Path] = [RED, GREEN, BLUE, CYAN.resize((3, 3)), tmp_path / "broken.png"] * 101
    answers = list(predictor.predict_stream(iter(colors), top_k=2))
    assert len(answers) == len(colors)
    for image, answer in zip(colors, answers, strict=True):
        if isinstance(image, Path):
            assert isinstance(answer, ImageError)
            assert "broken.png" in str(answer)
        else:
            assert answer == predictor.predict(image, top_k=2)


def test_a_stream_is_read_as_its_predictions_are_consumed(predictor: Predictor) -> None:
    taken = 0

    def images() -> Iterator[Image.Image]:
        nonlocal taken
        while True:
            taken += 1
            yield RED

    answers = predictor.predict_stream(images())
    for _ in range(1000):
        next(answers)
    assert taken < 1000 + 2000
    answers.close()  # type: ignore[attr-defined]


def test_a_long_stream_of_files_is_decoded_in_worker_processes(predictor: Predictor, tmp_path: Path) -> None:
    """The predictions equal single ones, and errors are in their places."""
    paths = []
    for number, image in enumerate((RED, GREEN, BLUE, CYAN)):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    paths.append(tmp_path / "absent.png")
    children: set[int] = set()

    def files() -> Iterator[Path]:
        for number in range(6000):
            yield paths[number % 5]
            if number % 500 == 499:
                children.update(child.pid for child in running_children("decode_worker"))

    answers = list(predictor.predict_stream(files()))
    expected = [*(predictor.predict(path) for path in paths[:4]), None]
    assert len(answers) == 6000
    assert all(
        isinstance(answer, ImageError) if number % 5 == 4 else answer == expected[number % 5]
        for number, answer in enumerate(answers)
    )
    assert len(children) >= (2 if available_cpus() > 1 else 0)
    assert not running_children("decode_worker")


def test_a_stream_refuses_a_wrong_top_k_immediately(predictor: Predictor) -> None:
    with pytest.raises(UsageError, match="top-k is 9"):
        predictor.predict_stream([], top_k=9)


def test_several_threads_can_predict_at_once(predictor: Predictor) -> None:
    expected = {index: predictor.predict(image) for index, image in enumerate((RED, GREEN, BLUE, GRAY))}
    images = list(enumerate((RED, GREEN, BLUE, GRAY))) * 100
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda entry: (entry[0], predictor.predict(entry[1])), images))
    assert all(expected[index] == answer for index, answer in found)


def test_an_empty_list_has_no_predictions(predictor: Predictor) -> None:
    assert predictor.predict([]) == []


def test_a_missing_model_is_a_model_file_error() -> None:
    with pytest.raises(ModelFileError, match=r"absent\.onnx"):
        load("absent.onnx")


def test_closes_the_backend(constant: ConstantBackend) -> None:
    with Predictor(constant) as predictor:
        assert predictor.predict(RED).label == "red"
        assert constant.closed == 0
    assert constant.closed == 1


def test_closes_the_backend_after_an_error(constant: ConstantBackend) -> None:
    with pytest.raises(ImageError), Predictor(constant) as predictor:
        predictor.predict("absent.png")
    assert constant.closed == 1


def test_an_onnx_model_needs_no_pytorch(trained: Trained, tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(pixels).save(path)
    code = (
        "import sys; from cifarx_serve.predictor import load\n"
        "with load(sys.argv[1], device='cpu') as predictor: print(predictor.predict(sys.argv[2]).label)\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'tensorboard', 'cifarx_train', 'cifarx_export', 'cifarx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    with load(trained.onnx, device="cpu") as predictor:
        assert fresh_python(code, trained.onnx, path) == predictor.predict(pixels).label


def test_an_image_for_which_the_model_returns_no_numbers_has_an_error(tmp_path: Path) -> None:
    black, red = (Image.new("RGB", (6, 4), color) for color in ("black", "red"))
    message = "the model does not return numbers for the image: check the model with `cifarx verify`"
    with load(write_relative_onnx(tmp_path / "relative.onnx"), device="cpu") as predictor:
        for found in (predictor.predict([red, black, red], top_k=2), list(predictor.predict_stream([red, black, red]))):
            first, second, third = found
            assert isinstance(second, ImageError)
            assert message in str(second)
            assert [each.label for each in (first, third) if isinstance(each, Prediction)] == ["red", "red"]
        with pytest.raises(ImageError, match=message):
            predictor.predict(black, logits=True)
