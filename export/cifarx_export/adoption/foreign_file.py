"""A classifier in a file that another program wrote, and what the file itself says about it."""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from cifarx_export.formats.registry import Artifact
from cifarx_serve.backends.base import Backend
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import Activation, Assumption, InputSpec, Layout, ModelSource, ModelSpec, Precision
from cifarx_train.checkpoints.checkpoint import file_sha256
from cifarx_train.models.options import SpecOverrides

_ANY_SIZE: Final = InputSpec(height=1, width=1)
_PIXEL_RANGE: Final = (0.0, 255.0)


class StatedInput(NamedTuple):
    """What a file says about its input; None where it says nothing.

    Attributes:
        layout, channels, height, width: of the input.
        pixels: whether the input is uint8, values from 0 to 255.
    """

    layout: Layout | None = None
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    pixels: bool = False


class StatedOutput(NamedTuple):
    """What a file says about its output.

    Attributes:
        name: the output that returns the classes, if the file has several.
        size: the number of values per image.
        activation: the activation at the end of the network, which therefore returns probabilities; None if there is
            none.
        class_names: the class names in its metadata, or None.
    """

    name: str | int | None
    size: int
    activation: Activation | None
    class_names: tuple[str, ...] | None = None


class ForeignFile(ABC):
    """A classifier in a file of another program.

    Attributes:
        path: the file.
        kind: its format, which is also that of the adopted file.
    """

    path: Path
    kind: Literal["onnx", "torchscript"]

    @abstractmethod
    def describe(self, overrides: SpecOverrides) -> ModelSpec:
        """Return the spec of the file: what the user states, what the file says, and what is assumed.

        Raises:
            ModelFileError: the file is not a classifier of images.
            UsageError: the user has to state more, or states something else than the file.
        """

    @abstractmethod
    def open_original(self, spec: ModelSpec) -> Backend:
        """Open the file as it is: the reference of the adopted one."""

    @abstractmethod
    def connected(self, spec: ModelSpec) -> Artifact:
        """Return the model with the input and output that the spec describes, and nothing else changed."""

    def adopted(self, spec: ModelSpec) -> Artifact:
        """Return the model as `connected` does, with a variable batch size as far as that is possible."""
        return self.connected(spec)

    @property
    def batch_size(self) -> int | None:
        """The only batch size that the file states to take, or None."""
        return None

    @property
    def precision(self) -> Precision:
        """The precision of the weights and of the arithmetic."""
        return "fp32"

    def input_spec(self, stated: StatedInput, overrides: SpecOverrides) -> InputSpec:
        """Return the preprocessing: what the file says about the input, completed by the user and by defaults.

        Raises:
            UsageError: the size is not stated, the user states another one than the file, or a scaling of values that
                the file takes as pixels.
            SpecError: the fields do not fit together.
        """
        fixed: dict[str, Any] = {
            name: value for name, value in stated._asdict().items() if value is not None and name != "pixels"
        }
        given = dict(overrides.fields.get("input", {}))
        if "color" in given and "channels" not in given:
            given["channels"] = 1 if given["color"] == "L" else 3
        for name, value in fixed.items():
            if given.get(name, value) != value:
                raise UsageError(f"{self.path} takes images with {name} {value}, not {given[name]}", "leave it out")
        known = fixed | given
        if not {"height", "width"} <= known.keys():
            raise UsageError(f"{self.path} does not say the size of its images", "state it with --image-size")
        if known.get("channels") == 1:
            known["color"] = "L"
        if stated.pixels:
            known = {"value_range": _PIXEL_RANGE, **known}
        size = SpecOverrides({"input": known}, whole_input=True).apply_to_input(_ANY_SIZE)
        is_scaled = size.value_range != _PIXEL_RANGE or any(size.mean) or any(std != 1 for std in size.std)
        if stated.pixels and is_scaled:
            raise UsageError(
                f"{self.path} takes pixels from 0 to 255, which it scales itself",
                "leave out the value range, the mean and the std",
            )
        return size

    def complete_spec(self, size: InputSpec, output: StatedOutput, overrides: SpecOverrides) -> ModelSpec:
        """Return the spec for an input and an output.

        Raises:
            UsageError: the number of class names is not that of the outputs.
            SpecError: the fields do not fit together.
        """
        classes = max(output.size, 2)
        fields = {name: value for name, value in overrides.fields.items() if name != "input"}
        names = fields.get("class_names", output.class_names)
        if names is not None and len(names) != classes:
            raise UsageError(
                f"{self.path} returns {output.size} values per image, which do not fit {len(names)} class names",
                f"give {classes} names in label order",
            )
        unknown: dict[Assumption, bool] = {
            "class_names": output.class_names is None,
            "preprocessing": not (overrides.whole_input or overrides.fields.get("input", {}).keys() >= {"mean", "std"}),
            "output": output.activation is None,
        }
        base = ModelSpec(
            model=re.sub(r"\W+", "_", self.path.name.partition(".")[0]).strip("_") or self.kind,
            source=ModelSource(kind=self.kind, name=self.path.name, sha256=file_sha256(self.path), output=output.name),
            class_names=output.class_names or tuple(f"class {index}" for index in range(classes)),
            input=size,
            output="probabilities" if output.activation else "logits",
            activation=output.activation or ("sigmoid" if output.size == 1 else "softmax"),
            outputs=1 if output.size == 1 else None,
            precision=self.precision,
            assumed=tuple(part for part, is_unknown in unknown.items() if is_unknown),
        )
        return SpecOverrides(fields).apply(base)
