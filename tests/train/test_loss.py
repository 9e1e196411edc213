import pytest
import torch
from torch.nn import functional

from cifarx_train.data.mixing import MixedLabels
from cifarx_train.loss import Loss, distillation_loss
from cifarx_train.recipes import load_recipe

LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
LABELS = torch.tensor([0, 2])
IMAGES = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)


def test_plain_labels_are_a_cross_entropy() -> None:
    loss = Loss(load_recipe("notes", overrides={"label_smoothing": 0.1}))
    assert torch.equal(loss(LOGITS, LABELS, IMAGES), functional.cross_entropy(LOGITS, LABELS, label_smoothing=0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_labels_are_a_cross_entropy_with_probabilities(smoothing: float) -> None:
    loss = Loss(load_recipe("notes", overrides={"label_smoothing": smoothing}))
    targets = MixedLabels(LABELS, LABELS.flip(0), torch.tensor([0.25, 1.0]))
    probabilities = torch.tensor([[0.25, 0.0, 0.75], [0.0, 0.0, 1.0]])
    expected = functional.cross_entropy(LOGITS, probabilities, label_smoothing=smoothing)
    torch.testing.assert_close(loss(LOGITS, targets, IMAGES), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_multiply_the_loss_of_each_image(smoothing: float) -> None:
    recipe = load_recipe("notes", overrides={"label_smoothing": smoothing})
    loss = Loss(recipe, class_weights=torch.tensor([0.5, 7.0, 3.0]))
    first, second = (
        functional.cross_entropy(LOGITS[index], LABELS[index], label_smoothing=smoothing) for index in (0, 1)
    )
    torch.testing.assert_close(loss(LOGITS, LABELS, IMAGES), (0.5 * first + 3 * second) / 2)
    mixed = MixedLabels(LABELS, LABELS.flip(0), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(loss(LOGITS, mixed, IMAGES), (0.5 * first + 3 * second) / 2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_a_divergence_of_probabilities(temperature: float) -> None:
    teacher = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    one, other = (teacher / temperature).softmax(1), (LOGITS / temperature).softmax(1)
    expected = (one * (one / other).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(distillation_loss(LOGITS, teacher, temperature), expected)
    assert distillation_loss(LOGITS, LOGITS + 3, temperature).abs() < 1e-5
