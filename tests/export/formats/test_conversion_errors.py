"""What a network's code cannot be converted to is reported in one line, with the line of the code."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cifarx_export.formats.conversion_errors import (
    code_line,
    is_user_code,
    reporting_conversion_errors,
    reporting_run_errors,
)
from cifarx_export.formats.exported_program import export_program
from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec

SPEC = ModelSpec(model="odd", class_names=tuple("abcde"), input=InputSpec(height=8, width=8))
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A network of which each subclass has one line that something cannot represent, marked by `# this line`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean((2, 3)))
        return logits

    @classmethod
    def place(cls) -> str:
        lines, first = inspect.getsourcelines(cls)
        offset = next(number for number, line in enumerate(lines) if "# this line" in line)
        return f"{Path(__file__).name} line {first + offset}"


class BranchOnValues(Network):
    def forward(self, images: Tensor) -> Tensor:
        if images.mean() > 0.5:  # this line
            images = 1 - images
        return super().forward(images)


class NumberOfValues(Network):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + int(images.sum()) % 3)  # this line


class NumPy(Network):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(images.numpy() * 2))  # this line


class BranchOnBatch(Network):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits * 2 if images.shape[0] == 2 else logits  # this line


class LoopOverImages(Network):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([super(LoopOverImages, self).forward(image[None])[0] for image in images])  # this line


class FixedReshape(Network):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.reshape(int(images.shape[0]), 3, 8, 8))  # this line


class EvenBatch(Network):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.view(-1, 2, 3, 8, 8).flatten(0, 1))  # this line


class NoOnnxOperator(Network):
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images) + torch.linalg.svdvals(images).mean()  # this line
        return logits


class Scripted(Network):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1)))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.inner(images))  # this line


class OtherSize(Network):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.reshape(64, 3, 8, 8))  # this line


DEPENDS = "depends on the values of the images, which {} cannot represent: compute with tensors"
ANY_BATCH = "works only for some batch sizes, and an exported network has to work for any: use x.shape[0] or -1"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (BranchOnValues, DEPENDS.format("pt2")),
        (NumberOfValues, DEPENDS.format("pt2")),
        (NumPy, DEPENDS.format("pt2")),
        (BranchOnBatch, ANY_BATCH),
        (LoopOverImages, ANY_BATCH),
        (FixedReshape, ANY_BATCH),
        (EvenBatch, ANY_BATCH),
        (Scripted, "cannot be converted to pt2 (TypeError: "),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_line_that_torch_export_cannot_convert(
    network: type[Network], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as raised:
        export_program(network().eval(), IMAGES, "pt2")
    text = str(raised.value)
    assert text.startswith(f"{network.place()} {message}")
    assert "\n" not in text
    assert tuple(capfd.readouterr()) == ("", "")


def convert(network: Callable[[], nn.Module]) -> None:
    def no_images(count: int) -> None:
        raise AssertionError(f"the converter loaded {count} images")

    source = ConversionSource(lambda: network().eval(), SPEC, NO_OPTIONS, no_images, silent)  # type: ignore[arg-type]
    next(convert_to_onnx(source))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (NoOnnxOperator, "uses linalg_svd, for which ONNX has no operator: use another operation, or another --format"),
        pytest.param(BranchOnValues, DEPENDS.format("ONNX"), marks=pytest.mark.slow),
        pytest.param(BranchOnBatch, ANY_BATCH, marks=pytest.mark.slow),
    ],
)
def test_the_line_that_has_no_onnx_operator(
    network: type[Network], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as raised:
        convert(network)
    assert str(raised.value).startswith(f"{network.place()} {message}")
    assert "\n" not in str(raised.value)
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_line_that_fails_on_a_batch() -> None:
    with pytest.raises(UsageError) as raised, reporting_run_errors(IMAGES):
        OtherSize()(IMAGES)
    message = f"{OtherSize.place()} fails for images of shape 2 x 3 x 8 x 8 (RuntimeError: shape '[64, 3, 8, 8]' is inv"
    assert str(raised.value).startswith(message)


def test_other_errors_are_not_changed() -> None:
    for error in (DataError("no images", "give some"), OSError(28, "No space left on device"), MemoryError()):
        with pytest.raises(type(error)) as raised, reporting_conversion_errors("ONNX", Network(), IMAGES):
            raise error
        assert raised.value is error


def test_the_user_code_is_preferred_to_packages() -> None:
    torch_file, package = torch.__file__, pytest.__file__
    assert torch_file is not None
    places = [("/home/me/model.py", 3), (package, 5), (torch_file, 7), ("<string>", 1)]
    assert code_line(places) == "model.py line 3"
    assert code_line(places[1:]) == f"{Path(package).name} line 5"
    assert code_line(places[2:]) is None
    assert [is_user_code(file) for file, _ in places] == [True, False, False, False]
