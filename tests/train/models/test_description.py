import pytest

from cifarx_serve.spec import InputSpec, ModelSource, ModelSpec
from cifarx_train.models.description import describe_classes, describe_input, describe_model, describe_output

SPEC = ModelSpec(
    model="net",
    class_names=("a", "b"),
    input=InputSpec(height=32, width=32),
    source=ModelSource(kind="python", name="model.py:Net"),
    assumed=("class_names", "preprocessing", "output"),
)


def test_what_nobody_states_is_assumed() -> None:
    assert describe_model(SPEC, "w.pth", {}) == [
        "network net (python model.py:Net): from w.pth",
        "2 classes (a, b): ASSUMED",
        "preprocessing RGB 32x32, stretch, bilinear, not normalized: ASSUMED",
        "output logits with softmax, one value per class: ASSUMED",
    ]


def test_each_line_names_who_states_it() -> None:
    hugging_face = ModelSpec(
        model="vit",
        class_names=("a", "b"),
        input=InputSpec(height=32, width=32),
        source=ModelSource(kind="huggingface", name="vit"),
    )
    lines = describe_model(hugging_face, "w.pth", {"class_names": "--classes", "activation": "--activation"})
    assert [line.rpartition(": ")[2] for line in lines] == [
        "from vit",
        "from --classes",
        "from vit",
        "from --activation",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (
            InputSpec(height=224, width=200, mean=(0.5,) * 3, std=(0.25,) * 3, resize="shorter_side", resize_to=256),
            "RGB 224x200, shorter side to 256, center crop, bilinear, mean 0.5, std 0.25",
        ),
        (
            InputSpec(height=8, width=8, resize="letterbox", fill=(1, 2, 3)),
            "RGB 8x8, letterbox, fill 1 2 3, bilinear, not normalized",
        ),
        (
            InputSpec(height=8, width=8, resize_to=(9, 10), value_range=(-1.0, 1.0), interpolation="nearest"),
            "RGB 8x8, stretch to 9x10, center crop, nearest, range -1 to 1, not normalized",
        ),
        (
            InputSpec(height=8, width=8, resize="letterbox", antialias=False, layout="NHWC", mean=(0.1, 0.2, 0.3)),
            "RGB 8x8, letterbox, fill 0, bilinear without antialias, NHWC, mean 0.1 0.2 0.3, std 1",
        ),
    ],
)
def test_preprocessing_in_words(size: InputSpec, text: str) -> None:
    assert describe_input(size) == text


def test_classes_and_outputs_in_words() -> None:
    assert describe_classes(tuple("abcdefg")) == "7 classes (a, b, c, d, e, …)"
    one = ModelSpec(model="x", class_names=("a", "b"), input=SPEC.input, activation="sigmoid", outputs=1)
    assert describe_output(one) == "logits with sigmoid, one value for two classes"
    probabilities = ModelSpec(model="x", class_names=("a", "b"), input=SPEC.input, output="probabilities")
    assert describe_output(probabilities) == "probabilities, one value per class"
