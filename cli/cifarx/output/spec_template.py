"""Write the spec of a model as TOML, for the user to complete and to give back with `--spec`."""

import json
from typing import Any, Final

import msgspec

from cifarx_serve.spec import Assumption, InputSpec, ModelSpec

_COMMENTS: Final = {
    "class_names": "in the order of their labels",
    "output": "logits or probabilities",
    "activation": "softmax: one label per image; sigmoid: several labels, or one output for two classes",
    "outputs": "1 for two classes with one output, that of the second class",
    "thresholds": "the score from which a label applies, one per output of a sigmoid; 0.5 if not set",
    "temperature": "what the logits are divided by before the activation, to calibrate the scores; 1 if not set",
    "height": "of the network's input, in pixels",
    "channels": "1 for grayscale, 3 for color",
    "layout": "NCHW or NHWC",
    "color": "RGB, BGR or L",
    "value_range": "what 0 and 255 are scaled to, before mean and std are applied",
    "mean": "one value per channel, in the order of color",
    "resize": "stretch, shorter_side (then a center crop) or letterbox",
    "resize_to": "the size before the center crop: one number for shorter_side, [height, width] for stretch",
    "crop_offset": "where an odd number of pixels is cut off: round as torchvision, floor as Hugging Face",
    "interpolation": "nearest, bilinear, bicubic or lanczos",
    "antialias": "true as Pillow resizes images, false as PyTorch resizes tensors by default",
    "fill": "the value of padded pixels, 0 to 255",
}
_EXAMPLES: Final = {"outputs": "1", "thresholds": "[0.5, 0.5]", "temperature": "1.5", "resize_to": "256"}
_OUTPUT_FIELDS: Final = ("class_names", "output", "activation", "outputs", "thresholds", "temperature")


def spec_template(spec: ModelSpec, file: str) -> str:
    """Return a TOML document with every field that `--spec` takes, and a comment for each that nobody stated.

    Args:
        spec: what is known.
        file: the name of the file that it comes from.
    """
    document: dict[str, Any] = msgspec.to_builtins(spec)
    lines = [f"# Model spec for {file}: complete it, and give it to a command with --spec FILE.", ""]
    for name in _OUTPUT_FIELDS:
        part: Assumption = "class_names" if name == "class_names" else "output"
        lines += _field(name, document[name], part in spec.assumed)
    lines += ["", "[input]"]
    for name in InputSpec.__struct_fields__:
        if name != "dtype":  # has only one value
            lines += _field(name, document["input"][name], "preprocessing" in spec.assumed)
    output = spec.source.output if spec.source else None
    lines += ["", "# For a network that returns several tensors: the key or the position of the logits."]
    lines += ["[source]", f"output = {_toml(output)}"] if output is not None else ["# [source]", '# output = "logits"']
    return "\n".join(lines)


def _field(name: str, value: Any, assumed: bool) -> list[str]:
    comment = f"  # {_COMMENTS[name]}" if name in _COMMENTS else ""
    if value is None:
        return [f"# {name} = {_EXAMPLES[name]}{comment}"]
    line = f"{name} = {_toml(value)}{comment}"
    return [line + ("; ASSUMED" if comment else "  # ASSUMED") if assumed else line]


def _toml(value: Any) -> str:
    """Return a value of a spec as TOML, which has the same strings, numbers, booleans and arrays as JSON."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the only character that JSON allows alone
