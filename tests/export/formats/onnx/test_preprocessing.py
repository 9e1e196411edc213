"""Models with embedded preprocessing must see the same pixels as after `preprocess`, which uses Pillow."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cifarx_export.export import export
from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.formats.onnx.preprocessing import embed_preprocessing, resize_model
from cifarx_export.formats.registry import OPSETS, ExportOptions
from cifarx_serve.images.preprocess import normalize, resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.predictor import load
from cifarx_serve.spec import InputSpec, Interpolation
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from tests.support.conversion import conversion_source
from tests.support.predictions import require_predictions

FILTERS: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_DIFFERENCE = 1
"""Gray levels. No difference has been observed; summation in another order could change the last bit."""

OPSETS_WITH_PREPROCESSING = [opset for opset in OPSETS if opset >= 18]

needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="before Pillow 13 the horizontal pass came first"
)
Resizer = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


def session(model: onnx.ModelProto, optimized: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@cache
def resizer(spec: InputSpec, opset: int = 18, optimized: bool = True) -> Resizer:
    """Return a function that resizes one image with the model."""
    model = resize_model(spec, opset)
    onnx.checker.check_model(model, full_check=True)
    onnx_session = session(model, optimized)

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        resized: NDArray[np.uint8] = onnx_session.run(None, {"input": pixels[None]})[0][0]
        return resized.transpose(1, 2, 0)

    return run


def difference(run: Resizer, spec: InputSpec, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the difference of each value from that of `resize`, in gray levels."""
    image = Image.fromarray(pixels if spec.channels == 3 else pixels[..., 0])
    error: NDArray[np.int64] = np.abs(run(pixels).astype(np.int64) - resize(image, spec))
    return error


def noise(seed: int, height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def extremes(seed: int, height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    """Return black and white noise, on which filters with negative weights overshoot."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, channels)).astype(np.uint8) * np.uint8(255)


side = st.integers(1, 12) | st.integers(1, 90)


@needs_pillow_13
@settings(max_examples=150, deadline=None)
@given(
    filter_name=st.sampled_from(FILTERS),
    source=st.tuples(side, side),
    target=st.sampled_from([(1, 1), (32, 32), (7, 40), (40, 7)]),
    pattern=st.sampled_from([noise, extremes]),
    seed=st.integers(0, 2**32 - 1),
)
@example("bicubic", (79, 3), (7, 40), extremes, 0)
@example("lanczos", (1, 90), (40, 7), extremes, 0)
def test_values_differ_from_pillow_by_no_more_than_the_maximum(
    filter_name: Any, source: tuple[int, int], target: tuple[int, int], pattern: Any, seed: int
) -> None:
    spec = InputSpec(height=target[0], width=target[1], interpolation=filter_name)
    assert difference(resizer(spec), spec, pattern(seed, *source)).max() <= MAX_DIFFERENCE


@needs_pillow_13
@pytest.mark.parametrize("filter_name", FILTERS)
def test_values_match_pillow(filter_name: Any) -> None:
    """When resizing one axis or both, up or down, with either pass first."""
    spec = InputSpec(height=24, width=40, interpolation=filter_name)
    sizes = [*itertools.product((1, 11, 24, 47, 300), (2, 40, 41, 131)), (24, 2000), (2000, 40), (700, 500)]
    for pattern, size in itertools.product((noise, extremes), sizes):
        assert not difference(resizer(spec), spec, pattern(0, *size)).any(), size


@pytest.mark.parametrize("filter_name", FILTERS)
def test_values_match_any_version_of_pillow_if_width_comes_first(filter_name: Any) -> None:
    spec = InputSpec(height=24, width=40, interpolation=filter_name)
    for size in [(24, 41), (24, 500), (60, 80), (200, 300), (3, 5), (10, 400), (24, 40)]:
        assert not difference(resizer(spec), spec, noise(0, *size)).any(), size


@pytest.mark.parametrize("filter_name", FILTERS)
def test_a_very_wide_image_is_exact(filter_name: Any) -> None:
    """From 33,026 columns on, white times the low bytes of the weights could exceed 31 bits."""
    spec = InputSpec(height=1, width=2, interpolation=filter_name)
    for pixels in (np.full((1, 70_000, 3), 255, np.uint8), extremes(0, 1, 70_000)):
        assert not difference(resizer(spec), spec, pixels).any()


MODES: dict[str, dict[str, Any]] = {
    "stretch and crop": {"resize_to": (30, 50)},
    "stretch, crop and pad": {"resize_to": (20, 60), "fill": (1, 2, 3)},
    "letterbox": {"resize": "letterbox", "fill": 114},
    "letterbox with a color": {"resize": "letterbox", "fill": (9, 8, 7), "color": "BGR"},
    "shorter side": {"resize": "shorter_side", "resize_to": 44},
    "shorter side, cropped from below": {"resize": "shorter_side", "resize_to": 45, "crop_offset": "floor"},
    "stretch and crop from below": {"resize_to": (31, 47), "crop_offset": "floor"},
    "shorter side, padded": {"resize": "shorter_side", "resize_to": 28, "fill": 7},
    "grayscale": {"resize": "shorter_side", "resize_to": 44, "channels": 1, "color": "L"},
    "grayscale letterbox": {"resize": "letterbox", "fill": 200, "channels": 1, "color": "L"},
}
FILTERS_WITH_ANTIALIAS = [(name, antialias) for name in FILTERS for antialias in (True, False)][:-1]  # not Lanczos


@needs_pillow_13
@pytest.mark.parametrize(("filter_name", "antialias"), FILTERS_WITH_ANTIALIAS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_matches_the_preprocessing(mode: str, filter_name: Any, antialias: bool) -> None:
    """With sizes that are larger, smaller, extremely tall and wide, and those to which images are resized."""
    spec = InputSpec(height=24, width=40, interpolation=filter_name, antialias=antialias, **MODES[mode])
    sizes = [(24, 40), (30, 50), (44, 44), (28, 28), (60, 81), (61, 83), (7, 300), (300, 7), (1, 1), (23, 41), (2, 3)]
    for pattern, size in itertools.product((noise, extremes), sizes):
        assert not difference(resizer(spec), spec, pattern(0, *size, spec.channels)).any(), size


@needs_pillow_13
@settings(max_examples=100, deadline=None)
@given(
    mode=st.sampled_from(sorted(MODES)),
    filter_name=st.sampled_from(FILTERS_WITH_ANTIALIAS),
    source=st.tuples(side, side),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_size_matches_the_preprocessing_in_every_mode(
    mode: str, filter_name: tuple[Any, bool], source: tuple[int, int], seed: int
) -> None:
    interpolation, antialias = filter_name
    spec = InputSpec(height=24, width=40, interpolation=interpolation, antialias=antialias, **MODES[mode])
    assert difference(resizer(spec), spec, noise(seed, *source, spec.channels)).max() <= MAX_DIFFERENCE


@pytest.mark.parametrize("opset", OPSETS_WITH_PREPROCESSING)
@pytest.mark.parametrize("optimized", [False, True])
def test_every_opset_gives_the_same_result(opset: int, optimized: bool) -> None:
    spec = InputSpec(height=24, width=40, interpolation="bicubic")
    for size in [(60, 80), (24, 40), (10, 90)]:
        assert not difference(resizer(spec, opset, optimized), spec, extremes(0, *size)).any()


def test_an_image_does_not_depend_on_the_rest_of_the_batch() -> None:
    spec = InputSpec(height=24, width=40, interpolation="lanczos")
    onnx_session = session(resize_model(spec))
    batch = np.stack([noise(seed, 50, 60) for seed in range(5)])
    together = onnx_session.run(None, {"input": batch})[0]
    for image, resized in zip(batch, together, strict=True):
        assert np.array_equal(onnx_session.run(None, {"input": image[None]})[0][0], resized)


single = st.floats(-10, 10, width=32)
spread = st.floats(0.0625, 16, width=32)


def identity_model(spec: InputSpec, opset: int = 18) -> onnx.ModelProto:
    """Return a network that returns its input, with names that the preprocessing also uses."""
    shape = ", ".join(map(str, spec.shape))
    text = f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        network (float[batch, {shape}] input) => (float[batch, values] logits)
        <float mean = {{0}}, int64[2] half = {{0, -1}}>
        {{
            result = Add (input, mean)
            resized = Sub (result, mean)
            logits = Reshape (resized, half)
        }}
    """
    return onnx.parser.parse_model(text)


@settings(max_examples=60, deadline=None)
@given(
    ends=st.tuples(single, single) | st.just((0.0, 1.0)),
    mean=st.tuples(single, single, single) | st.just((0.0, 0.0, 0.0)),
    std=st.tuples(spread, spread, spread) | st.just((1.0, 1.0, 1.0)),
)
@example((-1.0, 1.0), (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
@example((0.0, 1.0), (1e-30, 0.0, -1e-7), (1e-7, 1e30, 1.0))
def test_an_image_of_the_right_size_is_normalized_exactly(
    ends: tuple[float, float], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    spec = InputSpec(height=16, width=32, value_range=ends, mean=mean, std=std)
    levels = np.arange(512, dtype=np.uint16).astype(np.uint8).reshape(1, 16, 32, 1)
    pixels = np.concatenate([levels, levels[:, ::-1], levels[:, :, ::-1]], axis=3)
    model = embed_preprocessing(identity_model(spec), spec)
    onnx.checker.check_model(model, full_check=True)
    seen = session(model).run(["logits"], {"input": pixels})[0]
    assert np.array_equal(seen, normalize(pixels, spec).reshape(1, -1))  # all bits, except for the sign of a zero


@pytest.mark.parametrize("opset", OPSETS_WITH_PREPROCESSING)
def test_a_resized_image_is_normalized_exactly(opset: int) -> None:
    spec = InputSpec(height=16, width=32, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
    pixels = noise(0, 40, 50)
    seen = session(embed_preprocessing(identity_model(spec, opset), spec)).run(["logits"], {"input": pixels[None]})[0]
    assert seen.tobytes() == normalize(resize(Image.fromarray(pixels), spec)[None], spec).tobytes()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("color", "mean", "std"),
    [
        ("RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("BGR", (0.406, 0.456, 0.485), (0.225, 0.224, 0.229)),
        ("L", (0.1307,), (0.3081,)),
        ("BGR", (), ()),
    ],
)
def test_every_color_and_layout_is_normalized_exactly(layout: Any, color: Any, mean: Any, std: Any) -> None:
    channels: Any = 1 if color == "L" else 3
    spec = InputSpec(
        height=6, width=8, channels=channels, color=color, layout=layout, mean=mean, std=std, value_range=(0, 255),
        resize="letterbox", fill=114,
    )  # fmt: skip
    pixels = noise(0, 40, 50, channels)
    model = embed_preprocessing(identity_model(spec), spec)
    onnx.checker.check_model(model, full_check=True)
    seen = session(model).run(["logits"], {"input": pixels[None]})[0]
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    assert seen.tobytes() == normalize(resize(image, spec)[None], spec).tobytes()


def test_the_original_model_is_not_modified() -> None:
    spec = InputSpec(height=16, width=32)
    model = identity_model(spec)
    before = model.SerializeToString(deterministic=True)
    first, second = (embed_preprocessing(model, spec).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert model.SerializeToString(deterministic=True) == before


def test_every_constant_is_used() -> None:
    """ONNX Runtime warns about unused ones when it opens a file."""
    for (filter_name, antialias), mode in itertools.product(FILTERS_WITH_ANTIALIAS, ({}, *MODES.values())):
        spec = InputSpec(height=24, width=40, interpolation=filter_name, antialias=antialias, **mode)
        graph = resize_model(spec).graph
        assert {entry.name for entry in graph.initializer} <= set(_inputs_of_nodes(graph)), (filter_name, mode)


def _inputs_of_nodes(graph: onnx.GraphProto) -> list[str]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [name for node in graph.node for name in node.input] + [
        name for part in inner for name in _inputs_of_nodes(part)
    ]


@pytest.fixture(scope="module")
def embedded(checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    [made] = export(checkpoint, data=str(image_folder), out=folder, options=ExportOptions(embed_preprocessing=True))
    assert made.report.summary.passed
    assert made.path.name.endswith(".embedded.onnx")
    return made.path


def test_an_exported_file_accepts_images_of_any_size(embedded: Path) -> None:
    onnx_session = onnxruntime.InferenceSession(embedded, providers=["CPUExecutionProvider"])
    [input_info] = onnx_session.get_inputs()
    assert (input_info.name, input_info.type, input_info.shape) == (
        "input",
        "tensor(uint8)",
        ["batch", "height", "width", 3],
    )
    for shape in [(1, 1, 1, 3), (2, 32, 32, 3), (3, 7, 300, 3)]:
        assert onnx_session.run(["logits"], {"input": np.zeros(shape, np.uint8)})[0].shape == (shape[0], 10)


def test_predictions_match_the_file_without_preprocessing(embedded: Path, good_onnx: Path) -> None:
    images = [noise(seed, *size) for seed, size in enumerate([(32, 32), (50, 60), (32, 32), (9, 200), (60, 50)])]
    with load(embedded, device="cpu") as predictor, load(good_onnx, device="cpu") as plain:
        found, others = (require_predictions(opened.predict(images, 3)) for opened in (predictor, plain))
        for ours, expected in zip(found, others, strict=True):
            assert ours.label == expected.label
            assert ours.score == pytest.approx(expected.score, abs=1e-5)


def test_converting_again_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        source = conversion_source(load_checkpoint(checkpoint), options=ExportOptions(embed_preprocessing=True))
        next(convert_to_onnx(source)).save(tmp_path / name, source.spec)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@needs_pillow_13
@pytest.mark.slow
@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize("size", [32, 224])
def test_values_match_pillow_on_photographs_and_noise(
    filter_name: Any, size: int, dog: Path, cifar10_jpeg: Path
) -> None:
    """The results of docs/embedded-preprocessing.md: 741 images without a difference."""
    spec = InputSpec(height=size, width=size, interpolation=filter_name)
    sizes = np.exp(np.random.default_rng(0).uniform(0, np.log(2000), (117, 2))).round().astype(int)
    corners = [(1, 1), (1, 2000), (2000, 1)]
    drawn = [pattern(0, *sides) for sides in [*sizes, *corners] for pattern in (noise, extremes)]
    for pixels in [np.asarray(read_image(dog)), *_test_images(cifar10_jpeg), *drawn]:
        assert not difference(resizer(spec), spec, pixels).any(), pixels.shape


@cache
def _test_images(archive: Path) -> tuple[NDArray[np.uint8], ...]:
    """Return 250 test images, in their own size and enlarged to 77x50."""
    from cifarx_train.data.selection import select_dataset_for_model

    images = (
        select_dataset_for_model(None, str(archive), "raise").load("test", InputSpec(height=32, width=32)).images[::40]
    )
    enlarged = [np.asarray(Image.fromarray(image).resize((77, 50), Image.Resampling.BICUBIC)) for image in images]
    return (*images, *enlarged)
