import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_train.data.catalog import Entry
from cifarx_train.data.hold_out import hold_out

NAMES = st.sets(st.text("abc.0123456789", min_size=1, max_size=8), min_size=2, max_size=30)
FRACTIONS = st.floats(0.01, 0.99)


def entries(class_name: str, names: set[str]) -> list[Entry]:
    return [Entry(class_name, name, f"{class_name}/{name}") for name in sorted(names)]


@given(NAMES, NAMES, FRACTIONS)
def test_every_class_is_split_near_the_fraction(first: set[str], second: set[str], fraction: float) -> None:
    images = entries("a", first) + entries("b", second)
    train, test = hold_out(images, fraction)
    assert sorted([*train, *test]) == sorted(images)
    assert [list(part) for part in (train, test)] == [sorted(part, key=images.index) for part in (train, test)]
    for name, total in (("a", len(first)), ("b", len(second))):
        held_out = sum(image.class_name == name for image in test)
        assert 1 <= held_out <= total - 1
        assert abs(held_out - fraction * total) <= max(1, 0.1 * fraction * total)


@given(NAMES, NAMES, FRACTIONS)
def test_a_class_is_split_without_regard_to_the_others(first: set[str], second: set[str], fraction: float) -> None:
    alone = hold_out(entries("a", first), fraction)[1]
    together = hold_out(entries("b", second) + entries("a", first), fraction)[1]
    assert set(alone) == {image for image in together if image.class_name == "a"}


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_images_stay_where_they_are_when_others_are_added(fraction: float) -> None:
    images = entries("cat", {f"{number}.jpg" for number in range(3000)})
    before, after = (hold_out(part, fraction) for part in (images[:2000], images))
    assert set(before[0]) <= set(after[0])
    assert set(before[1]) <= set(after[1])


@pytest.mark.parametrize("count", range(2, 60))
def test_at_most_one_image_of_a_small_class_moves_when_another_is_added(count: int) -> None:
    images = entries("cat", {f"{number}.jpg" for number in range(60)})
    before, after = (set(hold_out(part, 0.2)[1]) for part in (images[:count], images[: count + 1]))
    assert len(before - after) <= 1


def test_the_split_never_changes() -> None:
    """Checkpoints of earlier versions are verified on the images that they were not trained on."""
    images = entries("ant", {f"{number:03d}.png" for number in range(20)})
    assert [image.name for image in hold_out(images, 0.2)[1]] == ["006.png", "013.png", "017.png", "018.png"]
