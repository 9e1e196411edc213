"""The comparison of specs and interfaces, without running a model."""

from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_export.parity.spec_checks import check_interface, check_specs
from cifarx_serve.backends.base import Backend, TensorInfo
from cifarx_serve.spec import InputSpec, ModelSpec

SPEC = ModelSpec(model="net", class_names=("cat", "dog", "frog"), input=InputSpec(height=8, width=6))


class Stated(Backend):
    """A backend that states its tensors and does not run."""

    name = "stated"

    def __init__(self, spec: ModelSpec, *tensors: TensorInfo) -> None:
        self.spec, self.tensors = spec, tensors

    @classmethod
    def read_spec(cls, path: Any) -> ModelSpec:
        raise NotImplementedError

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        raise NotImplementedError

    def tensor_infos(self) -> tuple[TensorInfo, ...]:
        return self.tensors

    def close(self) -> None:
        pass


def tensors(
    input_shape: tuple[Any, ...] = ("batch", 3, 8, 6), output_shape: tuple[Any, ...] = ("batch", 3), **names: str
) -> tuple[TensorInfo, TensorInfo]:
    return (
        TensorInfo(names.get("input", "input"), names.get("dtype", "float32"), input_shape),
        TensorInfo(names.get("output", "logits"), names.get("output_dtype", "float32"), output_shape),
    )


NHWC = msgspec.structs.replace(SPEC, input=msgspec.structs.replace(SPEC.input, layout="NHWC"))
EMBEDDED = msgspec.structs.replace(SPEC, embedded_preprocessing=True)


@pytest.mark.parametrize(
    ("spec", "stated"),
    [
        (SPEC, tensors()),
        (SPEC, tensors(input="pixel_values", output="scores")),
        (SPEC, tensors(("batch_size", 3, 8, 6), ("n", 3))),
        (SPEC, tensors((None, 3, 8, 6), (None, 3))),
        (SPEC, tensors(("batch", 3, "height", "width"))),
        (SPEC, tensors(("batch", 3, 8, 6), ("batch", "classes"))),
        (NHWC, tensors(("batch", 8, 6, 3))),
        (EMBEDDED, tensors(("batch", "height", "width", 3), dtype="uint8")),
    ],
)
def test_names_do_not_matter(spec: ModelSpec, stated: tuple[TensorInfo, ...]) -> None:
    [check] = check_interface(Stated(spec, *stated))
    assert check.passed, check
    assert stated[0].name in check.found


@pytest.mark.parametrize(
    ("spec", "stated"),
    [
        (SPEC, tensors((1, 3, 8, 6))),
        (SPEC, tensors(output_shape=(1, 3))),
        (SPEC, tensors(("batch", 3, 6, 8))),
        (SPEC, tensors(("batch", 1, 8, 6))),
        (SPEC, tensors(("batch", 8, 6, 3))),
        (SPEC, tensors(("batch", 3, 8))),
        (SPEC, tensors(output_shape=("batch", 4))),
        (SPEC, tensors(output_shape=("batch", 3, 1))),
        (SPEC, tensors(dtype="float16")),
        (SPEC, tensors(output_dtype="float16")),
        (SPEC, (*tensors(), TensorInfo("more", "float32", ("batch", 3)))),
        (SPEC, tensors()[:1]),
        (NHWC, tensors()),
        (EMBEDDED, tensors(("batch", 8, 6, 3), dtype="uint8")),
        (EMBEDDED, tensors()),
    ],
)
def test_types_ranks_and_sizes_do(spec: ModelSpec, stated: tuple[TensorInfo, ...]) -> None:
    [check] = check_interface(Stated(spec, *stated))
    assert not check.passed
    assert " instead of " in check.found


def test_a_file_that_states_nothing_is_not_compared() -> None:
    assert check_interface(Stated(SPEC)) == []


def test_the_first_difference_of_the_class_names_is_found() -> None:
    def found(*names: str) -> str:
        check = check_specs(SPEC, msgspec.structs.replace(SPEC, class_names=names))[0]
        assert not check.passed
        return check.found

    assert found("cat", "frog", "dog") == "class 1 is frog instead of dog"
    assert found("cat", "dog") == "2 instead of 3"


def test_every_field_that_differs_is_found() -> None:
    other = msgspec.structs.replace(SPEC.input, mean=(0.5, 0.5, 0.5), interpolation="bicubic")
    check = check_specs(SPEC, msgspec.structs.replace(SPEC, input=other))[1]
    assert (check.name, check.passed) == ("preprocessing", False)
    assert check.found == ("mean (0.5, 0.5, 0.5) instead of (0.0, 0.0, 0.0), interpolation bicubic instead of bilinear")


def test_scores_that_are_calibrated_otherwise_are_a_difference() -> None:
    check = check_specs(msgspec.structs.replace(SPEC, temperature=1.5), SPEC)[2]
    assert (check.name, check.passed, check.found) == ("output", False, "temperature None instead of 1.5")


def test_many_class_names_are_shortened() -> None:
    many = msgspec.structs.replace(SPEC, class_names=tuple(f"c{index}" for index in range(1000)))
    assert check_specs(many, many)[0].found.endswith("c10, c11 and 988 more")
