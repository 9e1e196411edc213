from typing import Any

import pytest
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.initial_spec import initial_spec
from cifarx_train.models.options import SpecOverrides

ARCHITECTURE = Architecture(
    name="net",
    stem="own",
    input=InputSpec(height=8, width=8),
    builder=lambda outputs, _size: nn.Linear(1, outputs),
    source=ModelSource(kind="python", name="model.py:Net"),
)
NOTHING = SpecOverrides()


def test_what_nobody_states_is_assumed() -> None:
    spec = initial_spec(ARCHITECTURE, 3, None, NOTHING)
    assert spec.class_names == ("class 0", "class 1", "class 2")
    assert spec.assumed == ("class_names", "preprocessing", "output")
    assert (spec.model, spec.input, spec.source) == ("net", ARCHITECTURE.input, ARCHITECTURE.source)


def test_what_the_source_states_is_not_assumed() -> None:
    stated = ARCHITECTURE._replace(class_names=("a", "b", "c"), states_input=True, activation="sigmoid")
    spec = initial_spec(stated, 3, None, NOTHING)
    assert (spec.class_names, spec.activation, spec.assumed) == (("a", "b", "c"), "sigmoid", ())


@pytest.mark.parametrize(
    ("file", "stated", "expected"),
    [
        (None, None, ("s1", "s2", "s3")),
        (("f1", "f2", "f3"), None, ("f1", "f2", "f3")),
        (("f1", "f2", "f3"), ["u1", "u2", "u3"], ("u1", "u2", "u3")),
    ],
)
def test_class_names_of_the_user_of_the_file_and_of_the_source(file: Any, stated: Any, expected: Any) -> None:
    overrides = SpecOverrides({"class_names": stated}) if stated else NOTHING
    source = ARCHITECTURE._replace(class_names=("s1", "s2", "s3"))
    spec = initial_spec(source, 3, file, overrides)
    assert spec.class_names == expected
    assert "class_names" not in spec.assumed


def test_class_names_of_another_number_are_not_those_of_the_weights() -> None:
    source = ARCHITECTURE._replace(class_names=("s1", "s2"))
    assert initial_spec(source, 3, None, NOTHING).class_names == ("class 0", "class 1", "class 2")
    with pytest.raises(UsageError, match=r"model.py:Net has 3 outputs, not 2: give as many class names"):
        initial_spec(ARCHITECTURE, 3, None, SpecOverrides({"class_names": ["a", "b"]}))


def test_one_output_is_for_two_classes() -> None:
    spec = initial_spec(ARCHITECTURE, 1, None, NOTHING)
    assert (spec.outputs, spec.activation, spec.output_size) == (1, "sigmoid", 1)
    assert spec.class_names == ("class 0", "class 1")
