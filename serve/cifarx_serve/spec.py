"""The model spec: one versioned JSON document in every checkpoint and artifact that says how to run the model.

The document is stored inside the file, so the file is all that is needed to run the model. A reader refuses a schema
that is newer than its own instead of guessing, and ignores unknown fields of its own schema.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from cifarx_serve.errors import SpecError

SCHEMA_VERSION = 1

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
ResizeFilter: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class InputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to convert an image to the input of the network.

    The image is converted to RGB, resized to (height, width) with the antialiased `resize` filter of Pillow, scaled
    from 0..255 to `value_range`, and normalized with `mean` and `std` per channel.
    """

    height: PositiveInt
    width: PositiveInt
    channels: Literal[3] = 3
    layout: Literal["NCHW"] = "NCHW"
    dtype: Literal["float32"] = "float32"
    color: Literal["RGB"] = msgspec.field(name="colour", default="RGB")  # the key of schema 1
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    resize: ResizeFilter = "bilinear"


class DataRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The dataset that a model was trained and tested on.

    The fingerprints are SHA-256 hashes of the class names, pixels and labels of each split.
    """

    name: str
    kind: Literal["builtin", "cifar10", "folder"]
    train_images: PositiveInt
    test_images: PositiveInt
    train_fingerprint: Sha256
    test_fingerprint: Sha256


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a model was trained.

    Attributes:
        recipe: the training recipe, as plain data.
        epochs: the number of complete epochs.
        test_accuracy: the accuracy on the whole test split, from 0 to 1; None if training was interrupted before the
            evaluation.
    """

    data: DataRecord
    recipe: dict[str, Any]
    epochs: Annotated[int, Meta(ge=0)]
    seed: int
    test_accuracy: Annotated[float, Meta(ge=0, le=1)] | None
    test_loss: float | None
    device: str
    versions: dict[str, str]

    @property
    def accuracy_text(self) -> str:
        """The test accuracy as a percentage, or a note that it was not measured."""
        return "accuracy not tested" if self.test_accuracy is None else f"{self.test_accuracy:.2%}"


class ParitySummary(msgspec.Struct, frozen=True, kw_only=True):
    """The result of the parity check that an artifact passed before it was written.

    Errors are absolute differences between logits, or None if the artifact returned no finite logits. `atol` and `rtol`
    are None for a precision without a tolerance. The accuracies are None if the images have other classes than the
    model.
    """

    passed: bool
    images: int
    batch_sizes: tuple[int, ...]
    max_abs_error: float | None
    mean_abs_error: float | None
    p999_abs_error: float | None
    required_tolerance: float | None
    atol: float | None
    rtol: float | None
    agreement: float
    forgiven: int
    reference_accuracy: float | None
    accuracy: float | None
    nonfinite: int
    provider: str
    data: str
    data_fingerprint: str


Precision: TypeAlias = Literal["fp32", "fp16", "int8"]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The document as a whole. The output of the model is an array of logits, (N, classes).

    Attributes:
        stem: "small" for a torchvision ResNet whose first layers were replaced for small images.
        class_names: the classes in the order of their labels.
        embedded_preprocessing: whether the file itself does the preprocessing that `input` describes. Such a file
            takes RGB pixels, uint8 (N, H, W, 3) of any size, instead of float32 (N, 3, height, width).
        minimum_onnxruntime: the oldest version of ONNX Runtime that runs the file, such as "1.18"; None for other
            formats.
        weights_sha256: the hash of the weights that the file was made from; see
            `cifarx_train.checkpoints.checkpoint.weights_sha256`.
    """

    schema_version: PositiveInt = SCHEMA_VERSION
    model: str
    stem: Literal["own", "small"] = "own"
    class_names: Annotated[tuple[str, ...], Meta(min_length=2)]
    input: InputSpec
    output: Literal["logits"] = "logits"
    precision: Precision = "fp32"
    embedded_preprocessing: bool = False
    minimum_onnxruntime: str | None = None
    training: TrainingRecord | None = None
    checkpoint_sha256: Sha256 | None = None
    weights_sha256: Sha256 | None = None
    exporter: dict[str, str] | None = None
    parity: ParitySummary | None = None

    def to_json(self) -> str:
        """Return the document on one line, with the keys in the order of the fields."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def from_json(document: str | bytes, origin: str) -> "ModelSpec":
        """Parse a document.

        Args:
            document: the JSON text.
            origin: the file that it came from, for error messages.

        Raises:
            SpecError: the text is not JSON, a field is missing or has a wrong type, or the schema is newer.
        """
        try:
            version = msgspec.json.decode(document, type=_Versioned).schema_version
            if version > SCHEMA_VERSION:
                raise SpecError(
                    f"{origin} has spec schema {version}, but this cifarx reads only up to {SCHEMA_VERSION}",
                    "install a newer cifarx",
                )
            return msgspec.json.decode(document, type=ModelSpec)
        # msgspec reports invalid UTF-8 and endless nesting with exceptions of Python itself.
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise SpecError(
                f"{origin} contains a malformed model spec ({error})",
                "create the file again with `cifarx train` or `cifarx export`",
            ) from error


class _Versioned(msgspec.Struct):
    """The version alone; it is read first, because a newer schema may change the type of any other field."""

    schema_version: PositiveInt
