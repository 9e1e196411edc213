"""Converts matplotlib figures to SVG elements, several of which can be embedded in one HTML page."""

import io
import xml.etree.ElementTree as ET
from typing import Final

from matplotlib.figure import Figure

_SVG: Final = "{http://www.w3.org/2000/svg}"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_NO_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg_element(figure: Figure, name: str, label: str = "") -> str:
    """Return the figure as an SVG element without a fixed size or a style sheet; its ids start with `name`.

    Args:
        figure: the figure to convert.
        name: the id of the element.
        label: a description for screen readers; empty if the figure is decoration.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    root = ET.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in [child for child in parent if child.tag in {f"{_SVG}style", f"{_SVG}metadata"}]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for attribute, value in list(element.attrib.items()):
            if attribute == _HREF:
                del element.attrib[attribute]
                element.set("href", value.replace("#", f"#{name}-", 1))
            elif attribute == "id":
                element.set("id", f"{name}-{value}")
            elif value.startswith("url(#"):
                element.set(attribute, value.replace("#", f"#{name}-", 1))
    for attribute in ("width", "height", "version"):
        del root.attrib[attribute]
    accessibility = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    root.attrib.update({"xmlns": _SVG.strip("{}"), "id": name, "stroke-linejoin": "round", **accessibility})
    return ET.tostring(root, encoding="unicode")
