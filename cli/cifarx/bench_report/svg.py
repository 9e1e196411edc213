"""A figure of matplotlib as an element of an HTML page, beside others."""

import io
import xml.etree.ElementTree as ET
from typing import Final

from matplotlib.figure import Figure

_SVG: Final = "{http://www.w3.org/2000/svg}"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_NO_METADATA: Final = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg_element(figure: Figure, name: str, label: str = "") -> str:
    """The figure as an element of a page: ids that begin with `name`, no size of its own, no style for the whole page.

    Args:
        figure: to write.
        name: the id of the element.
        label: what it shows, for those who do not see it; nothing where it is only decoration.
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
    described = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    root.attrib.update({"xmlns": _SVG.strip("{}"), "id": name, "stroke-linejoin": "round", **described})
    return ET.tostring(root, encoding="unicode")
