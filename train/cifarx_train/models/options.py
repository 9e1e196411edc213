"""What the user states about a model, in addition to what its file contains."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from cifarx_serve.errors import SpecError
from cifarx_serve.spec import Assumption, ModelSpec

_NOTHING: Mapping[str, Any] = MappingProxyType({})

# Fields of the spec, and what is no longer assumed once the user states them. Stating only the size of the images, for
# example, says nothing about how they are normalized.
_STATED_BY: Mapping[Assumption, frozenset[str]] = MappingProxyType(
    {
        "class_names": frozenset({"class_names"}),
        "output": frozenset({"output", "activation"}),
    }
)


class SpecOverrides(NamedTuple):
    """Fields of the spec that the user states. They replace what the file states and what is assumed.

    Attributes:
        fields: a part of a spec document, with the keys of `ModelSpec`; `input` is a part of an `InputSpec` document.
        whole_input: whether the fields of `input` describe the preprocessing completely, so that the other fields have
            their default instead of the file's value, and the preprocessing is no longer assumed.
    """

    fields: Mapping[str, Any] = _NOTHING
    whole_input: bool = False

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
        document["input"] = {**({} if self.whole_input else document["input"]), **input_}
        stated = {name for name, keys in _STATED_BY.items() if keys & given.keys()}
        if self.whole_input:
            stated.add("preprocessing")
        document["assumed"] = [name for name in spec.assumed if name not in stated]
        try:
            return msgspec.convert(document, ModelSpec)
        except msgspec.ValidationError as error:
            raise SpecError(f"the stated spec is not valid ({error})", "correct that field") from error


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

    @property
    def output(self) -> str | int | None:
        """The key or the position of the logits among the outputs of the network, if the user states it."""
        source = self.overrides.fields.get("source")
        output = source.get("output") if isinstance(source, Mapping) else None
        return output if isinstance(output, str | int) else None


NO_OPTIONS = ModelOptions()
