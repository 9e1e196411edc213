import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_train.class_balance import balanced_order, image_weights, rare_classes, require_class_names

counts = st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(any)


def labels_of(sizes: list[int]) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(counts)
def test_a_balanced_order_has_as_many_images_and_equally_many_of_every_class(sizes: list[int]) -> None:
    labels = labels_of(sizes)
    order = balanced_order(labels, seeded())
    assert order.dtype == torch.int64
    assert len(order) == len(labels)
    drawn = torch.bincount(labels[order], minlength=len(sizes))
    present = torch.tensor(sizes) > 0
    assert drawn[present].max() - drawn[present].min() <= 1
    assert drawn[~present].sum() == 0


@given(counts)
def test_no_image_is_repeated_before_all_others_of_its_class_were_used(sizes: list[int]) -> None:
    labels = labels_of(sizes)
    used = torch.bincount(balanced_order(labels, seeded()), minlength=len(labels))
    for label in labels.unique():
        assert used[labels == label].max() - used[labels == label].min() <= 1


def test_a_balanced_order_is_random_and_reproducible() -> None:
    labels = labels_of([40, 3, 20])
    first, again, other = (balanced_order(labels, seeded(seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other
    generator = seeded()
    assert balanced_order(labels, generator).tolist() != balanced_order(labels, generator).tolist()


def test_automatic_weights_are_inverse_to_the_number_of_images() -> None:
    weights = image_weights("auto", ("a", "b", "c"), (100, 50, 10))
    assert (weights * torch.tensor([100, 50, 10])).tolist() == pytest.approx([160 / 3] * 3)
    assert image_weights("auto", ("a", "b"), (7, 7)).tolist() == [1, 1]
    assert image_weights("auto", ("a", "b", "c"), (5, 0, 5)).tolist() == [1, 0, 1]


def test_given_weights_keep_their_ratios_and_have_the_mean_one_over_the_images() -> None:
    weights = image_weights({"b": 30.0, "a": 10.0}, ("a", "b"), (90, 10))
    assert weights[1] / weights[0] == pytest.approx(3)
    assert (weights * torch.tensor([90, 10])).sum() / 100 == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"cat": 1.0, "dgo": 2.0}, "class weights: 'dgo' is no class of the data"),
        ({"cat": 1.0}, "class weights: 'dog' is left out"),
    ],
)
def test_weights_of_other_classes_are_an_error(weights: dict[str, float], problem: str) -> None:
    with pytest.raises(UsageError, match="for each of the classes cat, dog") as caught:
        require_class_names(weights, ("cat", "dog"))
    assert problem in str(caught.value)
    require_class_names({"dog": 1.0, "cat": 2.0}, ("cat", "dog"))


def test_a_class_with_less_than_a_fifth_of_an_equal_share_is_rare() -> None:
    assert rare_classes([100, 100, 100]) == []
    assert rare_classes([100, 7, 5, 88]) == [2, 1]
    assert rare_classes([90, 10]) == []
    assert rare_classes([91, 9]) == [1]
    assert rare_classes([10, 0]) == []
