"""ExecuTorch files: their content, the batches they hold, that they are reproducible, and that faults are caught."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifarx_export.export import export
from cifarx_export.formats.executorch import converter
from cifarx_export.formats.executorch.converter import convert_to_executorch
from cifarx_export.formats.executorch.int8 import XnnpackQuantizationSearch
from cifarx_export.formats.executorch.lowering import MAX_BATCH_SIZE, RefusedProgramError, export_module
from cifarx_export.formats.int8.search import CALIBRATION_IMAGES
from cifarx_export.formats.sealed_artifact import SealedArtifact
from cifarx_export.parity.compare import EVAL_BATCH_SIZE, Reference, check_parity, run_reference
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.torch.executorch import ExecuTorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import ChecksumState, read_checksum
from cifarx_serve.files.trailing_document import read_document
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint
from cifarx_train.models.registry import get_architecture
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support.conversion import conversion_source, write_artifact
from tests.support.local_paths import assert_no_local_paths

pytest.importorskip("executorch", reason='no ExecuTorch: pip install "cifarx[executorch]"')

CPU = Device("cpu")


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    """A checkpoint that nobody trained."""
    spec = ModelSpec(model="lzh", class_names=tuple("abcdefghij"), input=InputSpec(height=32, width=32))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = get_architecture("lzh").build(len(spec.class_names), spec.input)
    return Checkpoint(spec, module.state_dict(), {})


@pytest.fixture(scope="module")
def artifact(loaded: Checkpoint) -> SealedArtifact:
    [artifact] = convert_to_executorch(conversion_source(loaded))
    return artifact


@pytest.fixture(scope="module")
def path(artifact: SealedArtifact, loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("executorch") / "a-name-to-search-for.pte"
    artifact.save(path, artifact.complete_spec(loaded.spec))
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 63, 64, 65, 130])
def test_logits_match_the_network_at_any_batch_size(path: Path, loaded: Checkpoint, size: int) -> None:
    inputs = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
    with ExecuTorchBackend(path, CPU) as backend, torch.inference_mode():
        assert backend.max_batch_size == MAX_BATCH_SIZE
        logits, expected = backend.run(inputs.numpy()), loaded.build()(inputs).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_spec_and_a_checksum_follow_the_program(path: Path, loaded: Checkpoint) -> None:
    document = read_document(path)
    assert document is not None
    spec = ModelSpec.from_json(document, "the file")
    assert spec.class_names == loaded.spec.class_names
    assert spec.exporter is not None
    assert "executorch" in spec.exporter
    assert read_checksum(path).state is ChecksumState.INTACT


@pytest.mark.filterwarnings("ignore")  # ExecuTorch's own
def test_the_tools_of_executorch_open_the_file(path: Path) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.runtime import Runtime

    [plan] = deserialize_pte_binary(path.read_bytes()).program.execution_plan
    assert {delegate.id for delegate in plan.delegates} == {"XnnpackBackend"}
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    assert method.execute([torch.zeros(2, 3, 32, 32)])[0].shape == (2, 10)


def test_another_conversion_has_the_same_bytes(path: Path, loaded: Checkpoint) -> None:
    [again] = convert_to_executorch(conversion_source(loaded))
    again.save(Path("again.pte"), again.complete_spec(loaded.spec))
    assert Path("again.pte").read_bytes() == path.read_bytes()


def test_no_path_of_this_machine_is_in_a_file(path: Path) -> None:
    assert b"a-name-to-search-for" not in path.read_bytes()
    assert_no_local_paths(path.read_bytes())


def test_the_missing_library_is_named(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(UsageError, match=r'ExecuTorch is not installed: pip install "cifarx\[executorch\]"'):
        next(convert_to_executorch(conversion_source(loaded)))


class Wrapped(nn.Module):
    """A network inside another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Branches(Wrapped):
    """Takes another branch for dark images."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return logits if images.sum() > 0 else -logits


class Shuffled(Wrapped):
    """Changes the order of channels as ShuffleNet does, where ExecuTorch fixes the size of the batch."""

    def forward(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        doubled = torch.cat([images, images], 1).view(count, 2, 3, height, width).transpose(1, 2).contiguous()
        return self.inner(doubled.view(count, 6, height, width).chunk(2, dim=1)[0])  # type: ignore[no-any-return]


class Sorted(Wrapped):
    """Uses an operator that ExecuTorch does not have."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return torch.cummax(logits, 1).values


@pytest.mark.parametrize(
    ("network", "message"),
    [
        pytest.param(Branches, r"^test_converter\.py line \d+ depends on the values of the images", id="branch"),
        pytest.param(Shuffled, "^ExecuTorch limits the network to batches of 2 images instead of 64", id="fixed batch"),
        pytest.param(Sorted, r"^the network cannot be converted to ExecuTorch \(.*cummax", id="no kernel"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    network: Callable[[nn.Module], nn.Module], message: str, loaded: Checkpoint
) -> None:
    source = conversion_source(loaded, module=network(loaded.build()).eval())
    with pytest.raises(UsageError, match=message) as raised:
        list(convert_to_executorch(source))
    assert "\n" not in str(raised.value)


def test_a_program_for_fewer_images_is_refused(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def export_for_fifteen(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
        monkeypatch.setattr("cifarx_export.formats.executorch.lowering.MAX_BATCH_SIZE", 15)
        program = export_module(module, example)
        monkeypatch.setattr("cifarx_export.formats.executorch.lowering.MAX_BATCH_SIZE", 64)
        return program

    monkeypatch.setattr(converter, "export_module", export_for_fifteen)
    with pytest.raises(UsageError, match="limits the network to batches of 15 images instead of 64"):
        next(convert_to_executorch(conversion_source(loaded)))


@pytest.mark.slow
def test_candidates_of_int8_are_smaller_and_a_refused_one_is_skipped(
    path: Path, loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = conversion_source(loaded, "int8")
    lines: list[str] = []
    monkeypatch.setattr("cifarx_export.formats.int8.search.CALIBRATION_IMAGES", CALIBRATION_IMAGES // 8)
    monkeypatch.setattr("cifarx_export.formats.int8.search._HELD_OUT_IMAGES", (64, 64))
    candidates = convert_to_executorch(dataclasses.replace(source, progress=lines.append))
    first = next(candidates)
    first.save(Path("int8.pte"), loaded.spec)
    assert Path("int8.pte").stat().st_size < 0.4 * path.stat().st_size
    assert [check.name for check in first.checks] == ["int8 gain"]
    with ExecuTorchBackend(Path("int8.pte"), CPU) as backend:
        assert backend.run(np.zeros((65, 3, 32, 32), np.float32)).shape == (65, 10)

    def refuse(_: object) -> bytes:
        raise RefusedProgramError("ExecuTorch does not run anything", "use another --format")

    monkeypatch.setattr(converter, "lower", refuse)
    with pytest.raises(RefusedProgramError, match="does not run anything"):
        list(convert_to_executorch(dataclasses.replace(source, progress=lines.append)))
    assert "int8: ExecuTorch does not run anything" in lines


class Depthwise(Wrapped):
    """A network after a depthwise convolution, which XNNPACK's quantizer leaves out of dynamic int8."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.filter = nn.Conv2d(3, 3, 3, padding=1, groups=3)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(self.filter(images))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_dynamic_int8_names_the_layers_that_stay_in_fp32(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifarx_export.formats.int8.search._HELD_OUT_IMAGES", (64, 64))
    module = Depthwise(loaded.build()).eval()
    search = XnnpackQuantizationSearch(module, conversion_source(loaded, "int8", module=module))
    dynamic = next(found for found in search.candidates() if found.facts["calibration"].startswith("none"))
    assert dynamic.facts["fp32 layers"] == "conv2d"
    assert 0.9 < dynamic.int8_share < 1


# Faults that a converter could make, each in a file that ExecuTorch runs.


class ChannelsSwapped(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.flip(1))  # type: ignore[no-any-return]


class LayoutSwapped(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.transpose(2, 3))  # type: ignore[no-any-return]


class Shifted(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images + 0.05)  # type: ignore[no-any-return]


class Scaled(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images * 1.1)  # type: ignore[no-any-return]


class Clipped(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.clamp(0.0, 0.7))  # type: ignore[no-any-return]


class FirstImageOnly(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images[:1]).expand(images.shape[0], -1)  # type: ignore[no-any-return]


class ClassesSwapped(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).flip(1)  # type: ignore[no-any-return]


class Rounded(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return (self.inner(images) * 64).round() / 64  # type: ignore[no-any-return]


class NotANumber(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return torch.sqrt(self.inner(images) - 1e9)


class Resized(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        small = nn.functional.avg_pool2d(images, 2)
        return self.inner(nn.functional.interpolate(small, scale_factor=2.0))  # type: ignore[no-any-return]


def of_another_seed(module: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.reset_parameters()
    return module


def one_weight_off(module: nn.Module) -> nn.Module:
    [*_, last] = module.parameters()
    with torch.no_grad():
        last[4] += 3e-4
    return module


FAULTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "channel order": ChannelsSwapped,
    "layout": LayoutSwapped,
    "mean": Shifted,
    "std": Scaled,
    "saturation": Clipped,
    "batch": FirstImageOnly,
    "class order": ClassesSwapped,
    "rounding": Rounded,
    "NaN": NotANumber,
    "resize": Resized,
    "stale weights": of_another_seed,
    "one bias": one_weight_off,
}


@pytest.fixture(scope="module")
def reference(confident_checkpoint: Path, parity_images: ParityData) -> Iterator[Reference]:
    count = EVAL_BATCH_SIZE + 3
    labels = None if parity_images.labels is None else parity_images.labels[:count]
    data = parity_images._replace(images=parity_images.images[:count], labels=labels)
    with PyTorchBackend(confident_checkpoint, CPU) as backend:
        yield run_reference(backend, data)


def failures(path: Path, reference: Reference) -> set[str]:
    with ExecuTorchBackend(path, CPU) as backend:
        result = check_parity(reference, backend, get_tolerance("fp32"))
    return {check.name for check in result.failures}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, confident_checkpoint: Path, reference: Reference) -> None:
    path = write_artifact(confident_checkpoint, "executorch", Path("faulty.pte"), lambda m: FAULTS[name](m).eval())
    assert failures(path, reference) & {"tolerance", "agreement", "finite"}


@pytest.mark.slow
def test_a_file_without_a_fault_passes(confident_checkpoint: Path, reference: Reference) -> None:
    path = write_artifact(confident_checkpoint, "executorch", Path("good.pte"), lambda module: module)
    assert not failures(path, reference)


@pytest.mark.slow
def test_an_onnx_file_is_converted(confident_checkpoint: Path, tmp_path: Path) -> None:
    given = confident_checkpoint.with_suffix(".onnx")
    [made] = export(given, ["executorch"], data="builtin", out=tmp_path)
    assert made.report.summary.passed, made.report.checks
    assert made.path.suffix == ".pte"
    assert made.report.checkpoint == given.name
