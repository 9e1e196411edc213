"""What does not change during a training run."""

from typing import NamedTuple

import torch

from cifarx_serve.spec import DataRecord, InputSpec, WeightsRecord
from cifarx_train.data.loaders.base import Loader
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluator
from cifarx_train.models.architecture import Architecture
from cifarx_train.recipes import Recipe


class TrainingPlan(NamedTuple):
    """Everything about a run that does not change while it trains."""

    architecture: Architecture
    input: InputSpec
    recipe: Recipe
    class_names: tuple[str, ...]
    data: DataRecord
    seed: int
    device: torch.device
    distributed: Distributed
    weights: WeightsRecord | None = None
    teacher: WeightsRecord | None = None

    def evaluator(self, images: Loader, distributed: Distributed | None = None) -> Evaluator:
        """Return an evaluator of the model on these images, together with the other processes unless stated."""
        return Evaluator(images, self.input, len(self.class_names), self.device, distributed or self.distributed)
