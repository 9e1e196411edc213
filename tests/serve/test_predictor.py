from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.backends.base import Backend
from cifarx_serve.devices import Device
from cifarx_serve.errors import ImageError, ModelFileError, UsageError
from cifarx_serve.predictor import Predictor, load, softmax
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import available_cpus
from tests.support.color_model import SPEC, write_onnx
from tests.support.trained_model import Trained

RED, GREEN, BLUE, CYAN, GRAY = (
    Image.new("RGB", (9, 5), color) for color in ("red", "lime", "blue", "cyan", (77, 77, 77))
)


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    return load(write_onnx(tmp_path / "colors.onnx"), device="cpu")


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
    [prediction] = predictor.predict([Image.new("RGB", (3, 3), (10, 200, 100))], top_k=3)
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
    gray, cyan = predictor.predict([GRAY, CYAN], top_k=3)
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
    with Image.open(path) as opened:
        sources: list[Any] = [path, str(path), path.read_bytes(), pixels, Image.fromarray(pixels), opened]
        predictions = predictor.predict(sources, top_k=3)
    assert predictions == [predictions[0]] * len(sources)
    assert predictor.predict(path, top_k=3) == predictions[0]


def test_takes_one_image_or_a_list(predictor: Predictor) -> None:
    single = predictor.predict(RED, top_k=2)
    assert predictor.predict([RED], 2) == predictor.predict((RED,), top_k=2) == [single]


def test_returns_logits_on_request(predictor: Predictor) -> None:
    gray, cyan = predictor.predict([GRAY, CYAN], logits=True)
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
    assert [prediction.label for prediction in predictor.predict(images)] == ["blue", "red", "green", "blue"]


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
    assert [prediction.label for prediction in Predictor(backend).predict(images)] == names
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
                children.update(child.pid for child in psutil.Process().children())

    answers = list(predictor.predict_stream(files()))
    expected = [*(predictor.predict(path) for path in paths[:4]), None]
    assert len(answers) == 6000
    assert all(
        isinstance(answer, ImageError) if number % 5 == 4 else answer == expected[number % 5]
        for number, answer in enumerate(answers)
    )
    assert len(children) >= (2 if available_cpus() > 1 else 0)
    assert not [child for child in psutil.Process().children() if child.pid in children]


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


def test_an_unreadable_image_is_an_image_error(predictor: Predictor) -> None:
    with pytest.raises(ImageError, match=r"absent\.png"):
        predictor.predict([RED, "absent.png"])
    with pytest.raises(ImageError):
        predictor.predict(b"not an image")


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


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
logit_batches = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.floats(-50, 50, width=32) | finite
)


@given(logit_batches)
@example(np.array([[3e38, -3e38, 0]], np.float32))
@example(np.zeros((2, 10), np.float32))
def test_scores_sum_to_one(logits: NDArray[np.float32]) -> None:
    scores = softmax(logits)
    assert scores.shape == logits.shape
    assert scores.dtype == np.float64
    assert ((scores >= 0) & (scores <= 1)).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-12)


@given(logit_batches)
def test_a_larger_logit_never_has_a_smaller_score(logits: NDArray[np.float32]) -> None:
    for row, scores in zip(logits, softmax(logits), strict=True):
        assert (np.diff(scores[np.argsort(row, kind="stable")]) >= 0).all()
        assert scores[np.argmax(row)] == scores.max()


@given(arrays.arrays(np.float32, (2, 5), elements=st.floats(-20, 20, width=32)))
def test_softmax_computes_the_formula(logits: NDArray[np.float32]) -> None:
    exponentials = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(softmax(logits), exponentials / exponentials.sum(axis=1, keepdims=True), rtol=1e-12)
