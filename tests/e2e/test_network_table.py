"""docs/networks.md: the table is complete, and some networks still answer as their authors' own modules."""

import re
from pathlib import Path

import pytest

from benchmarks.network_table import FORMATS, Pictures, check, write_pictures
from benchmarks.support.author_networks import ENTRIES, Entry

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"

# One small network of each source. Making the whole table takes half an hour.
CHOSEN = (
    "own file: dict of outputs",
    "own file: grayscale",
    "torchvision: resnet18 32",
    "whole module: resnet18, 3x3 stem, pool kept",
    "timm: lcnet_050",
    "Hugging Face: ConvNeXT",
    "safetensors: resnet18",
    "Lightning: resnet18",
    "adopted ONNX: resnet18",
    "adopted TorchScript: mobilenet_v2",
)


def title(entry: Entry) -> str:
    return f"{entry.source}: {entry.name}"


def table() -> dict[str, list[str]]:
    """Return the cells of the formats, by source and network."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {f"{source}: {name}": cells for source, name, *cells in rows if source not in ("source", "---")}


def test_the_table_has_every_network() -> None:
    assert list(table()) == [title(entry) for entry in ENTRIES]
    assert len(ENTRIES) >= 30
    assert len({entry.source for entry in ENTRIES}) >= 7


def test_every_cell_is_an_agreement_or_a_reason() -> None:
    for name, cells in table().items():
        assert len(cells) == len(FORMATS), name
        assert any(cells), name
        # The processors of Hugging Face resize with torchvision, whose pixels differ from Pillow's by up to two levels.
        agreement = r"100\.00%|99\.\d\d%" if name.startswith("Hugging Face") else r"100\.00%"
        for cell in cells:
            assert re.fullmatch(rf"{agreement}|refused: .{{10,}}|", cell), (name, cell)


def test_networks_are_exported_to_onnx() -> None:
    """A refusal is honest, but few networks may have one."""
    refused = [name for name, cells in table().items() if cells[FORMATS.index("onnx")].startswith("refused")]
    assert len(refused) <= 3, refused


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("pictures"), images=100)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHOSEN)
def test_an_artifact_agrees_with_the_module_and_transform_of_its_author(name: str, pictures: Pictures) -> None:
    (entry,) = [entry for entry in ENTRIES if title(entry) == name]
    if entry.source in ("timm", "Hugging Face"):
        pytest.importorskip("timm" if entry.source == "timm" else "transformers")
    (cell,) = check(entry, pictures, ["onnx"]).values()
    assert cell.agreement == 1, str(cell)
