"""Faults that only single images, edge inputs or the spec reveal. Small networks, traced by PyTorch's own tracer."""

import warnings
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifarx_export.parity.compare import ParityResult, Reference, check_parity, run_reference
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.spec import InputSpec, ModelSpec
from tests.support.module_backend import ModuleBackend

SPEC = ModelSpec(model="net", class_names=("cat", "dog", "frog"), input=InputSpec(height=8, width=8))


class Network(nn.Module):
    """A linear classifier of the mean colors of the four quarters of an image. All logits of a dark gray one are 0."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            self.head = nn.Linear(12, outputs)
            self.head.bias.copy_(-0.25 * self.head.weight.sum(1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = 10 * self.head(nn.functional.avg_pool2d(images, 4).flatten(1))
        return logits


class InvertsBright(Network):
    """Inverts a bright batch: a branch on the values, which a trace fixes."""

    def forward(self, images: Tensor) -> Tensor:
        if images.mean() > 0.5:
            images = 1 - images
        return super().forward(images)


class InvertsWhite(Network):
    """Inverts a white batch: no photograph takes the branch, and a batch of edge inputs does not either."""

    def forward(self, images: Tensor) -> Tensor:
        if images.mean() > 0.99:
            images = 1 - images
        return super().forward(images)


class Normalizes(Network):
    """Divides each image by its largest value, which is 0 for a black image."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images / images.amax((1, 2, 3), keepdim=True))


class Centers(Network):
    """Subtracts the mean of the batch."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images - images.mean())


@pytest.fixture(scope="module")
def images() -> ParityData:
    """A thousand images of which about one in seven is bright, while every batch of 64 is dark."""
    random = np.random.default_rng(0)
    darkest = np.where(random.random((1000, 1, 1, 1)) < 0.15, 128, 0)
    pixels = (darkest + random.integers(0, 128, (1000, 2, 2, 3)).repeat(4, 1).repeat(4, 2)).astype(np.uint8)
    return ParityData(pixels, random.integers(0, 3, 1000), "noise", "0" * 64)


def trace(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the branch, and that TorchScript is deprecated
        return torch.jit.trace(module.eval(), torch.rand(2, 3, 8, 8) / 2, check_trace=False)


def compare(module: nn.Module, artifact: Any, data: ParityData, spec: ModelSpec = SPEC) -> ParityResult:
    return check_against(run_reference(ModuleBackend(module, spec), data), artifact, spec)


def check_against(reference: Reference, artifact: Any, spec: ModelSpec) -> ParityResult:
    tolerance = get_tolerance("fp32", output=reference.spec.output)
    return check_parity(reference, ModuleBackend(artifact, spec), tolerance)


def failed(result: ParityResult) -> set[str]:
    return {check.name for check in result.failures}


def found(result: ParityResult, name: str) -> str:
    return next(check.found for check in result.checks if check.name == name)


def test_the_trace_of_a_network_without_branches_agrees(images: ParityData) -> None:
    result = compare(Network(), trace(Network()), images)
    assert failed(result) == set()
    assert "between batch 1 and 64 of the reference" in found(result, "batch effects")


def test_a_branch_on_the_values_of_a_batch_is_found_by_single_images(images: ParityData) -> None:
    result = compare(InvertsBright(), trace(InvertsBright()), images)
    assert failed(result) == {"batch effects", "tolerance", "agreement"}
    assert result.summary.agreement < 0.95
    assert "the reference depends on the other images of a batch" in found(result, "batch effects")


def test_a_branch_that_only_a_white_image_takes_is_found_by_the_edge_inputs(images: ParityData) -> None:
    result = compare(InvertsWhite(), trace(InvertsWhite()), images)
    assert failed(result) == {"tolerance"}
    assert found(result, "edge inputs") == "black, white and noise, together and one by one"


def test_a_network_that_mixes_the_images_of_a_batch_is_named(images: ParityData) -> None:
    """Its trace does the same, so that no comparison at equal batch sizes reveals it."""
    network = Centers()
    result = check_parity(
        run_reference(ModuleBackend(network, SPEC), images),
        ModuleBackend(trace(network), SPEC),
        get_tolerance("fp32"),
        batch_sizes=(1, 64),
    )
    assert failed(result) == {"batch effects"}
    assert found(result, "batch effects").endswith(" flips")


def test_a_reference_that_returns_nan_is_named(images: ParityData) -> None:
    result = compare(Normalizes(), trace(Normalizes()), images)
    assert {"reference", "finite"} <= failed(result)
    assert found(result, "reference") == (
        "the reference returns NaN for 0 of 1,000 images and 1 of 3 edge inputs: check its weights and its "
        "preprocessing"
    )


def broken(value: float) -> Network:
    network = Network()
    with torch.no_grad():
        network.head.bias[1] = value
    return network


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_a_reference_that_is_never_finite_is_named(value: float, name: str, images: ParityData) -> None:
    result = compare(broken(value), trace(Network()), images)
    assert found(result, "reference").startswith(f"the reference returns {name} for 1,000 of 1,000 images and 3 of 3")


# Outputs other than the logits of a softmax.

LABELS = msgspec.structs.replace(SPEC, activation="sigmoid", thresholds=(0.5, 0.2, 0.9))
ONE_LOGIT = msgspec.structs.replace(SPEC, class_names=("cat", "dog"), activation="sigmoid", outputs=1)
PROBABILITIES = msgspec.structs.replace(SPEC, output="probabilities")


class Shifted(nn.Module):
    """Adds a constant to one output of a network."""

    def __init__(self, network: nn.Module, index: int, amount: float) -> None:
        super().__init__()
        self.network, self.index, self.amount = network, index, amount

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.network(images).clone()
        outputs[:, self.index] += self.amount
        return outputs


def test_several_labels_agree_only_as_a_set(images: ParityData) -> None:
    """A shift of a label that is never the best one changes the set of labels of some images."""
    network = Network()
    reference = run_reference(ModuleBackend(network, LABELS), images)
    logits = reference.logits[:, 1].astype(np.float64)
    boundary = np.log(0.2 / 0.8)
    changed = (logits < boundary) & (logits + 0.3 >= boundary)
    assert 0 < changed.sum() < len(changed)
    result = check_against(reference, Shifted(network, 1, 0.3), LABELS)
    assert result.summary.agreement == pytest.approx(1 - changed.mean())
    assert check_against(reference, network, LABELS).passed
    assert result.error_analysis is not None
    assert result.error_analysis.disagreements == ()
    assert result.error_analysis.worst[0].flipped
    assert sum(row.images - row.agreeing for row in result.error_analysis.by_class) == 0  # labels were only added


def test_one_logit_decides_between_two_classes(images: ParityData) -> None:
    network = Network(outputs=1)
    reference = run_reference(ModuleBackend(network, ONE_LOGIT), images._replace(labels=None))
    assert reference.logits.shape == (1000, 1)
    assert check_against(reference, network, ONE_LOGIT).passed
    result = check_against(reference, Shifted(network, 0, 0.1), ONE_LOGIT)
    expected = (reference.logits >= 0) == (reference.logits + np.float32(0.1) >= 0)
    assert result.summary.agreement == pytest.approx(expected.mean())
    assert result.summary.agreement < 1
    assert result.error_analysis is not None
    assert {pair.reference for pair in result.error_analysis.disagreements} == {0}


def test_probabilities_have_a_smaller_tolerance(images: ParityData) -> None:
    network = nn.Sequential(Network(), nn.Softmax(1))
    reference = run_reference(ModuleBackend(network, PROBABILITIES), images)
    assert check_against(reference, network, PROBABILITIES).passed
    result = check_against(reference, Shifted(network, 0, 1.5e-4), PROBABILITIES)
    assert "tolerance" in failed(result)
    assert "probabilities outside 1e-05 + 0.0001·|ref|" in found(result, "tolerance")


def test_another_activation_is_a_failed_check_although_the_logits_are_equal(images: ParityData) -> None:
    reference = run_reference(ModuleBackend(Network(), LABELS), images)
    assert failed(check_against(reference, Network(), SPEC)) == {"output"}
    other = msgspec.structs.replace(LABELS, thresholds=None)
    result = check_against(reference, Network(), other)
    assert failed(result) == {"output"}
    assert found(result, "output") == "thresholds None instead of (0.5, 0.2, 0.9)"


# What nobody stated.


def test_what_is_assumed_is_marked_and_not_confirmed(images: ParityData) -> None:
    spec = msgspec.structs.replace(SPEC, assumed=("architecture", "class_names", "preprocessing", "output"))
    result = compare(Network(), Network(), images, spec)
    assert result.passed
    marked = {check.name: check.found for check in result.checks if check.assumed}
    assert set(marked) == {"architecture", "class names", "preprocessing", "output"}
    assert all(text.startswith("ASSUMED: ") for text in marked.values())
    assert marked["class names"] == "ASSUMED: cat, dog, frog"


def test_an_assumption_of_one_side_is_marked(images: ParityData) -> None:
    assumed = msgspec.structs.replace(SPEC, assumed=("preprocessing",))
    result = check_against(run_reference(ModuleBackend(Network(), assumed), images), Network(), SPEC)
    assert [check.name for check in result.checks if check.assumed] == ["preprocessing"]


def test_a_difference_fails_even_if_it_is_assumed(images: ParityData) -> None:
    assumed = msgspec.structs.replace(SPEC, assumed=("class_names",))
    other = msgspec.structs.replace(assumed, class_names=("a", "b", "c"))
    result = check_against(run_reference(ModuleBackend(Network(), assumed), images), Network(), other)
    assert failed(result) == {"class names"}
    assert not any(check.assumed for check in result.checks)


def test_the_agreement_states_its_bound_for_the_number_of_images(images: ParityData) -> None:
    result = compare(Network(), Network(), images)
    assert result.summary.agreement_bound == pytest.approx(0.05 ** (1 / 1000))
    assert found(result, "agreement") == (
        "100.0000% of 1000 images (minimum 100%); at least 99.70% with 95% confidence"
    )
