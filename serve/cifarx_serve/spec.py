"""The model spec: one versioned JSON document in every checkpoint and artifact that says how to run the model.

The document is stored inside the file, so the file is all that is needed to run the model. A reader refuses a schema
that is newer than its own instead of guessing, and ignores unknown fields of its own schema.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from cifarx_serve.errors import SpecError

SCHEMA_VERSION = 2

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Probability = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0.01, le=100)]
PixelValue = Annotated[int, Meta(ge=0, le=255)]
Color: TypeAlias = Literal["RGB", "BGR", "L"]
Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ResizeMode: TypeAlias = Literal["stretch", "shorter_side", "letterbox"]
CropOffset: TypeAlias = Literal["round", "floor"]
Layout: TypeAlias = Literal["NCHW", "NHWC"]
Activation: TypeAlias = Literal["softmax", "sigmoid"]
Assumption: TypeAlias = Literal["architecture", "class_names", "preprocessing", "output"]


class InputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to convert an image to the input of the network.

    The image is converted to `color`, resized and cropped to (height, width), scaled from 0..255 to `value_range`, and
    normalized with `mean` and `std` per channel. `cifarx_serve.images.preprocess` states every rounding.

    Attributes:
        height, width: the size of the network's input in pixels.
        channels: 1 for grayscale, 3 for color.
        layout: the order of the axes of the network's input.
        color: the order of the channels; "L" for grayscale.
        value_range: what 0 and 255 are scaled to, before `mean` and `std` are applied.
        mean, std: one value per channel, in the order of `color`. The default is 0 and 1.
        resize: "stretch" ignores the aspect ratio; "shorter_side" resizes the shorter side to `resize_to`; "letterbox"
            fits the whole image into (height, width) and pads the rest with `fill`.
        resize_to: the size before a center crop to (height, width): the shorter side for "shorter_side", (height,
            width) for "stretch". The default is the network's input size. Where the crop is larger than the resized
            image, the image is padded with `fill`.
        crop_offset: where the center crop starts if the number of pixels that it cuts off is odd: half of it, rounded
            to even as torchvision and timm do, or rounded down as Hugging Face's processors do.
        interpolation: the filter that resizes.
        antialias: whether the filter is widened when an image is made smaller, as Pillow does. Without it, images are
            resized as PyTorch's `interpolate` and torchvision resize tensors, which have no Lanczos filter.
        fill: the value of padded pixels: one for all channels, or one per channel in the order of `color`.
    """

    height: PositiveInt
    width: PositiveInt
    channels: Literal[1, 3] = 3
    layout: Layout = "NCHW"
    dtype: Literal["float32"] = "float32"
    color: Color = "RGB"
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[PositiveFloat, ...] = ()
    resize: ResizeMode = "stretch"
    # msgspec 0.22 crashes on a union of a constrained int and a tuple of a fixed length.
    resize_to: PositiveInt | tuple[PositiveInt, ...] | None = None
    crop_offset: CropOffset = "round"
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    fill: PixelValue | tuple[PixelValue, ...] = 0

    def __post_init__(self) -> None:
        """Set the default mean and standard deviation, and check that the fields fit together.

        Raises:
            ValueError: they do not. The message starts with the name of a field.
        """
        if (self.channels == 1) != (self.color == "L"):
            raise ValueError(f"channels is {self.channels}, which does not match color {self.color}")
        if not self.mean:
            msgspec.structs.force_setattr(self, "mean", (0.0,) * self.channels)
        if not self.std:
            msgspec.structs.force_setattr(self, "std", (1.0,) * self.channels)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        if isinstance(self.fill, tuple) and len(self.fill) != self.channels:
            raise ValueError(f"fill has {len(self.fill)} values for {self.channels} channels")
        if self.interpolation == "lanczos" and not self.antialias:
            raise ValueError("antialias is false, which interpolation lanczos does not support")
        if problem := self._resize_to_problem():
            raise ValueError(f"resize_to is {self.resize_to}, but resize {self.resize} {problem}")

    def _resize_to_problem(self) -> str | None:
        if self.resize == "letterbox":
            return None if self.resize_to is None else "takes none"
        if self.resize == "shorter_side":
            if self.resize_to is None and self.height != self.width:
                return f"needs a number, because {self.height}x{self.width} is not square"
            return "takes one number" if isinstance(self.resize_to, tuple) else None
        is_size = isinstance(self.resize_to, tuple) and len(self.resize_to) == 2
        return None if self.resize_to is None or is_size else "takes (height, width)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image as the network takes it, in the order of `layout`."""
        if self.layout == "NHWC":
            return self.height, self.width, self.channels
        return self.channels, self.height, self.width


class DataRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The dataset that a model was trained and tested on.

    The fingerprints are SHA-256 hashes of the class names, pixels and labels of each split.

    Attributes:
        val_images, val_fingerprint: of the split by which epochs were compared, if there is one beside the test split.
        split_fraction: the part of the images that was held out as the test split, if the dataset has no splits itself.
        labels: the name of the file with the labels, if they are not the names of folders.
    """

    name: str
    kind: Literal["builtin", "cifar10", "folder"]
    train_images: PositiveInt
    test_images: PositiveInt
    train_fingerprint: Sha256
    test_fingerprint: Sha256
    val_images: PositiveInt | None = None
    val_fingerprint: Sha256 | None = None
    split_fraction: Annotated[float, Meta(gt=0, lt=1)] | None = None
    labels: str | None = None


class WeightsRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Weights that a run started or learned from.

    Attributes:
        name: the name of the file, which is never a path, or what published them.
        sha256: the hash of the file; for published weights, `cifarx_train.checkpoints.checkpoint.weights_sha256`.
    """

    name: str
    sha256: Sha256


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a model was trained.

    Attributes:
        recipe: the training recipe, as plain data.
        epochs: the number of complete epochs.
        test_accuracy: the accuracy on the whole test split, from 0 to 1; None if training was interrupted before the
            evaluation, or if the epochs were compared on a val split and this one was not chosen.
        test_loss: the mean cross-entropy on the test split.
        val_accuracy, val_loss: the same on the val split, by which epochs are compared; None for data without one.
    """

    data: DataRecord
    recipe: dict[str, Any]
    epochs: Annotated[int, Meta(ge=0)]
    seed: int
    test_accuracy: Annotated[float, Meta(ge=0, le=1)] | None
    test_loss: float | None
    device: str
    versions: dict[str, str]
    weights: WeightsRecord | None = None
    teacher: WeightsRecord | None = None
    val_accuracy: Probability | None = None
    val_loss: float | None = None

    @property
    def accuracy_text(self) -> str:
        """The test accuracy as a percentage, or a note that it was not measured and what was measured instead."""
        if self.test_accuracy is not None:
            return f"{self.test_accuracy:.2%}"
        return "accuracy not tested" + ("" if self.val_accuracy is None else f" (val accuracy {self.val_accuracy:.2%})")


class ParitySummary(msgspec.Struct, frozen=True, kw_only=True):
    """The result of the parity check that an artifact passed before it was written.

    Errors are absolute differences between logits, or None if the artifact returned no finite logits. `atol` and `rtol`
    are None for a precision without a tolerance. The accuracies are None if the images have other classes than the
    model. `agreement_bound` is the lower bound of the agreement with 95% confidence, None in files of earlier versions.
    The accuracies are of the test images alone. `test_images` is their number, which is `images` without those of the
    training split that joined them; None in files of earlier versions. `warnings` say what a check that passed did not
    prove. `class_rates` say how often the reference predicts each class for a test image, and `score_rates` how often
    the score of its prediction is in each bin of `prediction_counts.SCORE_BOUNDS`; None in files of earlier versions.
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
    agreement_bound: float | None = None
    test_images: int | None = None
    training_images: int = 0
    warnings: tuple[str, ...] = ()
    class_rates: tuple[float, ...] | None = None
    score_rates: tuple[float, ...] | None = None


Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """What builds the network again.

    Attributes:
        kind: "builtin" and "torchvision" for a name of the registry; "timm", "huggingface" and "entry_point" for a name
            of theirs; "python" for code of the user; "checkpoint" for a file that contains the whole model; "module"
            for a module in memory; "onnx" and "torchscript" for an adopted file.
        name: the name, such as `resnet18`, `FILE.py:CALLABLE` or the name of the file.
        arguments: the keyword arguments of the callable.
        sha256: the hash of the user's source code, or of the adopted file.
        output: the key or the position of the logits, if the network returns a dict, an object, a tuple or a list.
    """

    kind: Literal[
        "builtin",
        "torchvision",
        "timm",
        "huggingface",
        "entry_point",
        "python",
        "checkpoint",
        "module",
        "onnx",
        "torchscript",
    ]
    name: str
    arguments: dict[str, Any] = {}
    sha256: Sha256 | None = None
    output: str | int | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The document as a whole. The output of the model is float32, (N, `output_size`).

    Attributes:
        model: the short name of the network, for file names and people.
        stem: "small" for a torchvision ResNet whose first layers were replaced for small images.
        source: what builds the network again; None in files of schema 1, whose `model` is a name of the registry.
        class_names: the classes in the order of their labels.
        output: whether the model returns logits, or probabilities that need no activation.
        activation: what turns logits into scores: "softmax" for one label per image; "sigmoid" for several labels per
            image, or for two classes with one logit, which is that of the second class.
        outputs: 1 for two classes with one logit; None for one value per class.
        thresholds: the score from which a label applies, one per output of a sigmoid; None for 0.5. Scores are compared
            with it before they are calibrated.
        temperature: what the logits are divided by before the activation, so that scores are calibrated; None for 1. It
            changes no predicted class or label.
        assumed: the parts of the spec that neither the file nor the user stated.
        embedded_preprocessing: whether the file itself does the preprocessing that `input` describes. Such a file
            takes RGB or grayscale pixels, uint8 (N, H, W, channels) of any size, instead of float32 (N, *input.shape).
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
    output: Literal["logits", "probabilities"] = "logits"
    activation: Activation = "softmax"
    outputs: Literal[1] | None = None
    thresholds: tuple[Probability, ...] | None = None
    temperature: Temperature | None = None
    source: ModelSource | None = None
    assumed: tuple[Assumption, ...] = ()
    precision: Precision = "fp32"
    embedded_preprocessing: bool = False
    minimum_onnxruntime: str | None = None
    training: TrainingRecord | None = None
    checkpoint_sha256: Sha256 | None = None
    weights_sha256: Sha256 | None = None
    exporter: dict[str, str] | None = None
    parity: ParitySummary | None = None

    def __post_init__(self) -> None:
        """Check that the fields fit together.

        Raises:
            ValueError: they do not. The message starts with the name of a field.
        """
        if self.outputs == 1 and (self.activation != "sigmoid" or len(self.class_names) != 2):
            raise ValueError(
                f"outputs is 1, which needs activation sigmoid and 2 class names, "
                f"not {self.activation} and {len(self.class_names)}"
            )
        if self.thresholds is not None and self.activation != "sigmoid":
            raise ValueError(f"thresholds need activation sigmoid, not {self.activation}")
        if self.thresholds is not None and len(self.thresholds) != self.output_size:
            raise ValueError(f"thresholds has {len(self.thresholds)} values for {self.output_size} outputs")
        if self.temperature is not None and self.output != "logits":
            raise ValueError(f"temperature needs output logits, not {self.output}")

    @property
    def output_size(self) -> int:
        """The number of values that the model returns per image."""
        return self.outputs or len(self.class_names)

    @property
    def multi_label(self) -> bool:
        """Whether any number of labels can apply to an image."""
        return self.activation == "sigmoid" and self.outputs is None

    @property
    def assumption(self) -> str | None:
        """A sentence that names the parts of the spec that nobody stated, or None. It starts with ASSUMED."""
        if not self.assumed:
            return None
        parts = ", ".join(name.replace("_", " ") for name in self.assumed)
        return f"ASSUMED {parts}: stated neither by the file, nor by the source of the network, nor by the user"

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
            if version == 1:
                return _from_schema_1(document)
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


def _from_schema_1(document: str | bytes) -> ModelSpec:
    """Parse a document of schema 1, in which `colour` is the color and `resize` is the interpolation."""
    fields = msgspec.json.decode(document)
    input_ = fields.get("input") if isinstance(fields, dict) else None
    if isinstance(input_, dict):
        for old, new in (("colour", "color"), ("resize", "interpolation")):
            if old in input_:
                input_[new] = input_.pop(old)
        fields["schema_version"] = SCHEMA_VERSION
    return msgspec.convert(fields, ModelSpec)
