"""What the user states about a model, in addition to what its file contains."""

import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from cifarx_serve.errors import SpecError, UsageError
from cifarx_serve.spec import Assumption, InputSpec, ModelSpec

_NOTHING: Mapping[str, Any] = MappingProxyType({})

# Fields of the spec, and what is no longer assumed once the user states them. Stating only the size of the images, for
# example, says nothing about how they are normalized.
_STATED_BY: Mapping[Assumption, frozenset[str]] = MappingProxyType(
    {
        "class_names": frozenset({"class_names"}),
        "output": frozenset({"output", "activation"}),
    }
)

_NAMED: Mapping[str, str] = MappingProxyType({"builtin": "", "torchvision": "", "entry_point": "", "timm": "timm/"})
"""The kinds of sources that a name builds again, and the prefix of the name in `model`."""

_STATED_PREPROCESSING = frozenset({"height", "width", "mean", "std"})
"""The fields of the input that have to be stated so that the preprocessing as a whole is not assumed."""


class SpecOverrides(NamedTuple):
    """Fields of the spec that the user states. They replace what the file states and what is assumed.

    Attributes:
        fields: a part of a spec document, with the keys of `ModelSpec`; `input` is a part of an `InputSpec` document. A
            `mean` or `std` of one value is for all channels.
        whole_input: whether the fields of `input` describe the preprocessing completely, so that the other fields have
            their default instead of the file's value, and the preprocessing is no longer assumed.
        origins: who states each of the fields, for messages, such as `--classes`.
        network: the document of a `ModelSource` that a spec file states. `ModelOptions.with_network` uses it.
    """

    fields: Mapping[str, Any] = _NOTHING
    whole_input: bool = False
    origins: Mapping[str, str] = _NOTHING
    network: Mapping[str, Any] = _NOTHING

    @property
    def output(self) -> str | int | None:
        """The key or the position of the logits among the outputs of the network, if the user states it."""
        source = self.fields.get("source")
        output = source.get("output") if isinstance(source, Mapping) else None
        return output if isinstance(output, str | int) else None

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with the fields replaced.

        Raises:
            SpecError: a field has a wrong type or value, or the fields do not fit together.
        """
        if not self.fields:
            return spec
        document: dict[str, Any] = msgspec.to_builtins(spec)
        given = dict(self.fields)
        input_ = given.pop("input", {})
        if isinstance(source := given.pop("source", None), dict) and document["source"] is not None:
            document["source"] |= source
        document |= given
        document["input"] = _merge_input({} if self.whole_input else document["input"], input_)
        stated = {name for name, keys in _STATED_BY.items() if keys & given.keys()}
        if self.whole_input or input_.keys() >= _STATED_PREPROCESSING:
            stated.add("preprocessing")
        document["assumed"] = [name for name in spec.assumed if name not in stated]
        try:
            return msgspec.convert(document, ModelSpec)
        except msgspec.ValidationError as error:
            raise SpecError(f"the stated spec is not valid ({error})", "correct that field") from error

    def apply_to_input(self, size: InputSpec) -> InputSpec:
        """Return an input with the fields of `input` replaced.

        Raises:
            SpecError: see `apply`.
        """
        document = _merge_input({} if self.whole_input else msgspec.to_builtins(size), self.fields.get("input", {}))
        try:
            return msgspec.convert(document, InputSpec)
        except msgspec.ValidationError as error:
            raise SpecError(f"the stated input is not valid ({error})", "correct that field") from error


def _merge_input(document: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an input document with fields replaced, and the fields that depend on them adapted."""
    merged = {**document, **given}
    if "color" in given and "channels" not in given:
        merged["channels"] = 1 if given["color"] == "L" else 3
    channels = merged.get("channels", 3)
    for name in ("mean", "std", "fill"):
        values = merged.get(name)
        if name in given:
            if isinstance(values, list | tuple) and len(values) == 1:
                merged[name] = list(values) * channels
        elif isinstance(values, list | tuple) and len(values) != channels:
            del merged[name]  # values for other channels
    if given.keys() & {"height", "width"} and not given.keys() & {"resize", "resize_to"}:
        merged["resize_to"] = _scale_resize_to(document, merged)
    return merged


def _scale_resize_to(document: Mapping[str, Any], merged: Mapping[str, Any]) -> Any:
    """Return `resize_to` for another size of the crop: in the same proportion."""
    resize_to = document.get("resize_to")
    if isinstance(resize_to, int):
        old, new = (min(fields["height"], fields["width"]) for fields in (document, merged))
        return round(resize_to * new / old)
    if isinstance(resize_to, list | tuple):
        sides = zip(resize_to, ("height", "width"), strict=True)
        return [round(size * merged[side] / document[side]) for size, side in sides]
    return resize_to


class ModelOptions(NamedTuple):
    """How to read a checkpoint: what the file itself may not state.

    Attributes:
        model: the source of the network: a name of the registry, `timm/NAME`, `hf/DIRECTORY`, `FILE.py:CALLABLE` or
            `package.module:CALLABLE`; None if the file states it.
        arguments: the keyword arguments of a callable.
        weights_key: the key of the weights to use, if the file contains several sets.
        overrides: fields of the spec.
    """

    model: str | None = None
    arguments: Mapping[str, Any] = _NOTHING
    weights_key: str | None = None
    overrides: SpecOverrides = SpecOverrides()

    def with_network(self) -> "ModelOptions":
        """Return the options with the network that the spec file names, unless `model` states one.

        Code of the user is not named: a file never decides which code runs. See `missing_code_error`.
        """
        kind, name = (str(self.overrides.network.get(field)) for field in ("kind", "name"))
        if self.model is not None or kind not in _NAMED:
            return self
        origins = {**self.overrides.origins, "model": self.overrides.origins["network"]}
        return self._replace(
            model=f"{_NAMED[kind]}{name}",
            arguments={**(self.overrides.network.get("arguments") or {}), **self.arguments},
            overrides=self.overrides._replace(origins=origins),
        )

    def missing_code_error(self) -> UsageError | None:
        """Return the error for a spec file that names the user's code where `model` has to, or None."""
        if self.model is not None or self.overrides.network.get("kind") != "python":
            return None
        name = str(self.overrides.network.get("name"))
        return UsageError(
            f"{self.overrides.origins['network']} names the code {name}, and a file never decides which code runs",
            f"state it with --model {shlex.quote(name)}",
        )

    @property
    def origins(self) -> dict[str, str]:
        """Who states each part of the spec, for messages."""
        return {**({} if self.model is None else {"model": "--model"}), **self.overrides.origins}

    def to_document(self) -> dict[str, Any]:
        """Return plain data from which `from_document` makes the same options in another process."""
        overrides = {
            "fields": dict(self.overrides.fields),
            "whole_input": self.overrides.whole_input,
            "origins": dict(self.overrides.origins),
        }
        return {**self._asdict(), "arguments": dict(self.arguments), "overrides": overrides}

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> "ModelOptions":
        """Return the options of `to_document`."""
        return ModelOptions(**{**document, "overrides": SpecOverrides(**document["overrides"])})


NO_OPTIONS = ModelOptions()
