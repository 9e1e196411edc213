"""Class names are taken from where programs store them, and only if they are class names."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cifarx_train.checkpoints.external.class_names import StatedNames, find_class_names
from cifarx_train.checkpoints.external.torch_file import load_torch_file
from tests.support.external_checkpoints import save

NAMES = ("fox", "cat", "dog")
BY_NAME = {"dog": 2, "fox": 0, "cat": 1}
BY_LABEL = {2: "dog", 0: "fox", 1: "cat"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", list(NAMES)),
        ("class_names", NAMES),
        ("names", list(NAMES)),
        ("names", BY_LABEL),
        ("labels", list(NAMES)),
        ("categories", list(NAMES)),
        ("class_to_idx", BY_NAME),
        ("label2id", BY_NAME),
        ("idx_to_class", BY_LABEL),
        ("id2label", {str(label): name for label, name in BY_LABEL.items()}),
    ],
)
@pytest.mark.parametrize("place", ["", "hyper_parameters", "args", "config", "meta", "hyper_parameters.args", "model"])
def test_names_in_their_usual_places(key: str, value: Any, place: str) -> None:
    content: Any = {key: value}
    for part in reversed(place.split(".") if place else []):
        content = {part: content, "epoch": 1}
    has_labels = isinstance(value, dict)
    assert find_class_names(content) == [StatedNames(f"{place}.{key}".lstrip("."), NAMES, has_labels)]


def test_names_in_objects(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    module.class_to_idx = BY_NAME  # type: ignore[assignment]
    content = {"args": argparse.Namespace(classes=list(NAMES)), "model": nn.DataParallel(module)}
    found = find_class_names(load_torch_file(save(content, tmp_path / "x.pth")))
    assert found == [StatedNames("model.class_to_idx", NAMES, True), StatedNames("args.classes", NAMES, False)]


def test_explicit_labels_come_before_an_order() -> None:
    found = find_class_names({"classes": sorted(NAMES), "class_to_idx": BY_NAME})
    assert found == [StatedNames("class_to_idx", NAMES, True), StatedNames("classes", tuple(sorted(NAMES)), False)]


@pytest.mark.parametrize(
    "content",
    [
        {"classes": 3},
        {"classes": "cat"},
        {"classes": ["cat"]},
        {"classes": ["cat", "cat"]},
        {"classes": ["cat", 1]},
        {"classes": ["cat", ""]},
        {"classes": ["cat", "\x1b[31mdog"]},
        {"class_to_idx": {"cat": 0, "dog": 2}},
        {"class_to_idx": {"cat": 0, "dog": 0}},
        {"class_to_idx": {"cat": "x", "dog": 1}},
        {"class_to_idx": {0: "cat", 1: "dog"}},
        {"idx_to_class": {0: "cat", "0": "dog"}},
        {"idx_to_class": {1.5: "cat", 0: "dog"}},
        {"labels": torch.zeros(3)},
        {"state_dict": {"classes": list(NAMES)}},
        {"history": {"names": ["loss", "accuracy"]}},
        {"args": {"args": {"args": {"args": {"classes": list(NAMES)}}}}},
        ["cat", "dog"],
        None,
    ],
)
def test_anything_else_is_ignored(content: Any) -> None:
    assert find_class_names(content) == []


PLAIN = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.floats(),
    lambda items: st.lists(items, max_size=4) | st.dictionaries(st.integers() | st.text(max_size=3), items, max_size=4),
)


@given(PLAIN)
def test_any_value_is_either_names_or_ignored(value: Any) -> None:
    for key in ("classes", "names", "class_to_idx", "idx_to_class"):
        for stated in find_class_names({key: value}):
            assert len(stated.names) >= 2
            assert all(type(name) is str and name.isprintable() for name in stated.names)
