"""Networks of several sources answer as their authors' own modules, as in the table of the benchmarks."""

import pytest

from benchmarks.network_table import Pictures, check, write_pictures
from benchmarks.support.author_networks import ENTRIES, Entry

# Small ones, and none whose random weights amplify rounding errors. Making the whole table takes most of an hour.
CHOSEN = (
    "own file: dict of outputs",
    "own file: grayscale",
    "Hugging Face: ConvNeXT",
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
    if entry.source == "Hugging Face":
        pytest.importorskip("transformers")
    (cell,) = check(entry, pictures, ["onnx"]).values()
    assert cell.agreement == 1, str(cell)
