"""What every checkpoint and artifact says about itself: one versioned JSON document.

The document travels inside the file, so the file alone is enough to run it. Older readers refuse a newer
schema instead of guessing; fields they do not know within their own schema are ignored.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from cifarx_serve.errors import SpecError

SCHEMA_VERSION = 1

Positive = Annotated[int, Meta(ge=1)]
Spread = Annotated[float, Meta(gt=0)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class InputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How an image becomes the network's input.

    The image is taken as RGB, resized to (height, width) with Pillow's antialiased `resize` filter, scaled
    from 0..255 to `value_range`, and normalized by `mean` and `std` a channel.
    """

    height: Positive
    width: Positive
    channels: Literal[3] = 3
    layout: Literal["NCHW"] = "NCHW"
    dtype: Literal["float32"] = "float32"
    color: Literal["RGB"] = msgspec.field(name="colour", default="RGB")
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[Spread, Spread, Spread] = (1.0, 1.0, 1.0)
    resize: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"


class DataRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The data set a model was trained and tested on; fingerprints are sha256 over classes, pixels and labels."""

    name: str
    kind: Literal["builtin", "cifar10", "folder"]
    train_images: Positive
    test_images: Positive
    train_fingerprint: Sha256
    test_fingerprint: Sha256


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a model was trained: `epochs` whole ones, the recipe as plain data.

    `test_accuracy` is a fraction, of the whole test split; None where a run was interrupted before it was eval_model.
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
        """The test accuracy in percent, or that there is none."""
        return "accuracy not tested" if self.test_accuracy is None else f"{self.test_accuracy:.2%}"


class ParitySummary(msgspec.Struct, frozen=True, kw_only=True):
    """What was proved of an artifact before it got its name.

    Errors are absolute, of logits, and None where the artifact gave no finite one; tolerances are None where the
    precision has none; accuracies are None where the images' classes are not the model's.
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
    """The document itself. `class_names` are in label order; the output is a (N, classes) array of logits.

    Attributes:
        stem: "small" for a torchvision ResNet whose first layers were made for small images.
        embedded_preprocessing: whether the file itself does what `input` says: it then takes RGB pixels,
            uint8 (N, H, W, 3) of any size, in place of float32 (N, 3, height, width).
        minimum_onnxruntime: the oldest ONNX Runtime that runs the file, as "1.18"; None for other formats.
        weights_sha256: of the weights it was made from; see `cifarx_train.checkpoints.checkpoint.weights_sha256`.
    """

    schema_version: Positive = SCHEMA_VERSION
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
        """The document, on one line, its keys in the order of the fields."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def from_json(document: str | bytes, origin: str) -> "ModelSpec":
        """Read a document.

        Args:
            document: the JSON text.
            origin: the file it came from, for the error.

        Raises:
            SpecError: not JSON, a field missing or of the wrong type, or a newer schema.
        """
        try:
            version = msgspec.json.decode(document, type=_Versioned).schema_version
            if version > SCHEMA_VERSION:
                raise SpecError(
                    f"{origin} has spec schema {version}, and this cifarx reads up to {SCHEMA_VERSION}",
                    "install a newer cifarx",
                )
            return msgspec.json.decode(document, type=ModelSpec)
        # Bytes that are no UTF-8 and brackets nested without end are not errors of msgspec's own.
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise SpecError(
                f"{origin} holds a malformed model spec ({error})",
                "make the file again with `cifarx train` or `cifarx export`",
            ) from error


class _Versioned(msgspec.Struct):
    """Only the version, read first: a newer schema may have other types in every other field."""

    schema_version: Positive
