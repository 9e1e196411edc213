"""One network of each source answers as its author's own module, as in the table of `benchmarks/network_table.py`."""

import pytest

from benchmarks.network_table import Pictures, check, write_pictures
from benchmarks.support.author_networks import ENTRIES, Entry

# The smallest networks of the sources. Making the whole table takes most of an hour.
CHOSEN = (
    "own file: dict of outputs",
    "own file: grayscale",
    "torchvision: regnet_y_400mf 32",
    "timm: lcnet_050",
    "Hugging Face: ConvNeXT",
    "Lightning: mobilenet_v3_small",
    "adopted ONNX: resnet18",
    "adopted TorchScript: mobilenet_v2",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def title(entry: Entry) -> str:
    return f"{entry.source}: {entry.name}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("name", CHOSEN)
def test_an_artifact_agrees_with_the_module_and_transform_of_its_author(name: str, pictures: Pictures) -> None:
    (entry,) = [entry for entry in ENTRIES if title(entry) == name]
    if entry.source in ("timm", "Hugging Face"):
        pytest.importorskip("timm" if entry.source == "timm" else "transformers")
    (cell,) = check(entry, pictures, ["onnx"]).values()
    assert cell.agreement == 1, str(cell)
