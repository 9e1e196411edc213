"""The learning-rate schedule."""

import math

from cifarx_train.recipes import Recipe


def lr_factor(recipe: Recipe, step: int, steps: int) -> float:
    """The share of the peak rate for step number `step`, from 0, of `steps` in the run.

    It rises along a line over the warm-up, then stays, or falls to zero along a line or half a cosine (SGDR,
    Loshchilov and Hutter 2017, without restarts).
    """
    warm_up = round(recipe.warm_up * steps)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - warm_up, 1)
    match recipe.schedule:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "constant":
            return 1.0
