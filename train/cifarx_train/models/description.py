"""Describe in words what a model takes and gives, and who states it, before it is used."""

from collections.abc import Mapping, Sequence

from cifarx_serve.spec import Assumption, InputSpec, ModelSpec

_MAX_NAMES = 5


def describe_model(spec: ModelSpec, file: str, origins: Mapping[str, str]) -> list[str]:
    """Return one line each for the network, the class names, the preprocessing and the output.

    Each line ends with who states it: an option, the file, or the source of the network; or it says `ASSUMED`.

    Args:
        spec: the spec that will be used.
        file: the name of the file that the model comes from.
        origins: the options that state a field, see `SpecOverrides`.
    """
    source = spec.source
    published = source.name if source is not None and source.kind in ("timm", "huggingface") else None

    def line(text: str, part: Assumption, *fields: str) -> str:
        if part in spec.assumed:
            return f"{text}: ASSUMED"
        stated = next((origins[field] for field in fields if field in origins), None)
        return f"{text}: from {stated or (published if part != 'output' else None) or file}"

    network = f"network {spec.model}" if source is None else f"network {spec.model} ({source.kind} {source.name})"
    return [
        line(network, "architecture", "model"),
        line(describe_classes(spec.class_names), "class_names", "class_names"),
        line(f"preprocessing {describe_input(spec.input)}", "preprocessing", "input"),
        line(f"output {describe_output(spec)}", "output", "output", "activation"),
    ]


def describe_classes(names: tuple[str, ...]) -> str:
    """Return the number of classes and the first names, as `10 classes (airplane, automobile, bird, cat, deer, …)`."""
    more = ", …" if len(names) > _MAX_NAMES else ""
    return f"{len(names)} classes ({', '.join(names[:_MAX_NAMES])}{more})"


def describe_input(size: InputSpec) -> str:
    """Return how images become the input, as `RGB 224x224, shorter side to 256, bilinear, mean …, std …`."""
    text = [f"{size.color} {size.height}x{size.width}"]
    match size.resize_to:
        case int() as shorter:
            text.append(f"shorter side to {shorter}, center crop")
        case tuple() as sides:
            text.append(f"{size.resize} to {sides[0]}x{sides[1]}, center crop")
        case None:
            text.append(size.resize.replace("_", " "))
    fill = size.fill if isinstance(size.fill, tuple) else (size.fill,)
    if size.resize == "letterbox" or any(fill):
        text.append(f"fill {_numbers(fill)}")
    text.append(size.interpolation if size.antialias else f"{size.interpolation} without antialias")
    if size.layout != "NCHW":
        text.append(size.layout)
    if size.value_range != (0.0, 1.0):
        text.append(f"range {size.value_range[0]:g} to {size.value_range[1]:g}")
    if any(size.mean) or any(std != 1 for std in size.std):
        text.append(f"mean {_numbers(size.mean)}, std {_numbers(size.std)}")
    else:
        text.append("not normalized")
    return ", ".join(text)


def describe_output(spec: ModelSpec) -> str:
    """Return what the network returns, as `logits with softmax`."""
    outputs = "one value for two classes" if spec.outputs else "one value per class"
    return f"{spec.output}{'' if spec.output == 'probabilities' else f' with {spec.activation}'}, {outputs}"


def _numbers(values: Sequence[float]) -> str:
    shown = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:g}" for value in shown)
