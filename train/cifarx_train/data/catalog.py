"""Which images belong to which split and class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cifarx_train.data.dataset import Split


class Entry(NamedTuple):
    """An image of a split.

    Attributes:
        class_name: its class.
        name: its name within the class; an image can be in a subfolder of the class.
        path: where its file is in the dataset, or what identifies it in a table or a shard.
    """

    class_name: str
    name: str
    path: str


@dataclass(frozen=True)
class Catalog:
    """All images of a dataset.

    Attributes:
        class_names: in label order.
        splits: the images of each split, in order. There are always a train and a test split.
        left_out: one line for each kind of thing that is missing or not used.
    """

    class_names: tuple[str, ...]
    splits: Mapping[Split, tuple[Entry, ...]]
    left_out: tuple[str, ...] = ()
