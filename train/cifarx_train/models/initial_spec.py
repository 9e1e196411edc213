"""The spec of a network that cifarx did not train."""

from cifarx_serve.spec import Assumption, ModelSpec
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.options import SpecOverrides
from cifarx_train.models.outputs import outputs_error


def initial_spec(
    architecture: Architecture, outputs: int, class_names: tuple[str, ...] | None, overrides: SpecOverrides
) -> ModelSpec:
    """Return the spec of a network, in which everything is marked as assumed that nobody states.

    Args:
        architecture: the network, whose source may state the class names, the preprocessing and the activation.
        outputs: the number of values that it returns per image.
        class_names: the class names that the file with the weights states.
        overrides: what the user states.

    Raises:
        UsageError: the user states another number of classes than the network has outputs.
        SpecError: what the user states is not valid.
    """
    count = max(2, outputs)
    names = class_names
    if names is None and architecture.class_names is not None and len(architecture.class_names) == count:
        names = architecture.class_names
    assumed: list[Assumption] = []
    if names is None:
        assumed.append("class_names")
    if not architecture.states_input:
        assumed.append("preprocessing")
    if architecture.activation is None:
        assumed.append("output")
    spec = overrides.apply(
        ModelSpec(
            model=architecture.name,
            stem=architecture.stem,
            class_names=names or tuple(f"class {label}" for label in range(count)),
            input=architecture.input,
            activation="sigmoid" if outputs == 1 else architecture.activation or "softmax",
            outputs=1 if outputs == 1 else None,
            source=architecture.source,
            assumed=tuple(assumed),
        )
    )
    if spec.output_size != outputs:
        raise outputs_error(architecture.source, outputs, spec.output_size)
    return spec
