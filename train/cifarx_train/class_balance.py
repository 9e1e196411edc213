"""Classes with different numbers of training images: weights for the loss, and a sampler that draws them equally."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from cifarx_serve.errors import UsageError

RARE: Final = 0.2
"""A class is rare if it has less than this fraction of the images it would have if all classes were equal.

A network that never predicts such a class loses less than a fifth of what an average class is worth in accuracy and
loss, which is why both hide it.
"""


def rare_classes(counts: Sequence[int]) -> list[int]:
    """Return the labels of the rare classes, the rarest first. A class without images has none to weight or repeat.

    Args:
        counts: the number of training images of each class.
    """
    limit = RARE * sum(counts) / len(counts)
    return sorted((label for label, count in enumerate(counts) if 0 < count < limit), key=counts.__getitem__)


def require_class_names(weights: Mapping[str, float], class_names: Sequence[str]) -> None:
    """Raise a UsageError unless the weights are those of exactly these classes."""
    known = ", ".join(class_names[:10]) + (", …" if len(class_names) > 10 else "")
    for problem, names in (
        ("no class of the data", [name for name in weights if name not in class_names]),
        ("left out", [name for name in class_names if name not in weights]),
    ):
        if names:
            shown = ", ".join(map(repr, names[:5])) + (" and more" if len(names) > 5 else "")
            verb = "are" if len(names) > 1 else "is"
            raise UsageError(
                f"class weights: {shown} {verb} {problem}", f"give one weight for each of the classes {known}"
            )


def image_weights(
    weights: Literal["auto"] | Mapping[str, float], class_names: Sequence[str], counts: Sequence[int]
) -> Tensor:
    """Return the factor of the loss of an image of each class, float32 (classes,).

    The factors are scaled so that their mean over the images is 1: class weights do not change the size of a step on
    average.

    Args:
        weights: "auto" for the inverse of the number of images; or the weight of each class, by name.
        class_names: the classes in label order.
        counts: how often images of each class are trained on.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    if weights == "auto":
        relative = torch.where(images > 0, 1 / images, 0)
    else:
        relative = torch.tensor([weights[name] for name in class_names], dtype=torch.float64)
    return (relative * images.sum() / (relative * images).sum()).float()


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return an order of an epoch in which all classes are equally frequent, int64 (N,), with as many images as before.

    Every class that has images gets N / classes places; what is left over goes to random ones. The images of a class
    take turns: none is repeated before all others were used, so a frequent class loses some images in each epoch and a
    rare one repeats its own.

    Args:
        labels: int64 (N,), on the CPU.
        generator: of the CPU; decides everything that is random.
    """
    groups = labels.argsort(stable=True).split(torch.bincount(labels).tolist())
    groups = tuple(group for group in groups if len(group))
    places = torch.full((len(groups),), len(labels) // len(groups))
    places[torch.randperm(len(groups), generator=generator)[: len(labels) % len(groups)]] += 1
    drawn = [
        torch.cat([group.repeat(count // len(group)), _sample(group, count % len(group), generator)])
        for group, count in zip(groups, places.tolist(), strict=True)
    ]
    return torch.cat(drawn)[torch.randperm(len(labels), generator=generator)]


def _sample(group: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return group[torch.randperm(len(group), generator=generator)[:count]]
