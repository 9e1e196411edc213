"""Which weights a run starts from: random ones, given or published ones, or those of the run that it resumes."""

from typing import NamedTuple

from cifarx_serve.progress import Progress
from cifarx_serve.spec import InputSpec, WeightsRecord
from cifarx_train.checkpoints.head import build_without_memory, head_keys
from cifarx_train.checkpoints.pretrained import Pretrained, Transfer, load_pretrained, plan_transfer, weights_name
from cifarx_train.checkpoints.resume import ResumePoint, require_same
from cifarx_train.distributed import Distributed
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.description import describe_input
from cifarx_train.models.options import ModelOptions
from cifarx_train.recipes import Recipe


class StartingWeights(NamedTuple):
    """The weights that a run starts from.

    Attributes:
        architecture: the network, with the preprocessing that belongs to the weights.
        record: what the weights are; None for random ones.
        pretrained: the weights; None for random ones, and for a run that is resumed.
    """

    architecture: Architecture
    record: WeightsRecord | None = None
    pretrained: Pretrained | None = None

    def plan(
        self, size: InputSpec, class_names: tuple[str, ...], options: ModelOptions, progress: Progress
    ) -> Transfer | None:
        """Match the weights with the network, and report what is used of them and how images are preprocessed.

        Args:
            size: the input of the network.
            class_names: the classes of the data.
            options: what the user states.
            progress: receives one line for each.

        Returns:
            None for random weights.

        Raises:
            ModelFileError: the weights do not match the network.
        """
        if self.pretrained is None:
            return None
        architecture, name = self.architecture, self.pretrained.record.name
        module = build_without_memory(architecture, len(class_names), size)
        head = head_keys(architecture, size)
        transfer = plan_transfer(self.pretrained, module, head, class_names, architecture.source.name)
        stated = options.overrides.origins.get("input")
        source = name if self.pretrained.input else architecture.source.name if architecture.states_input else None
        origin = ", ".join(filter(None, (stated, source)))
        end = f"from {origin}" if origin else "ASSUMED, state what belongs to the weights with --preprocessing"
        for line in (*transfer.lines, f"preprocessing {describe_input(size)}: {end}"):
            progress(line)
        return transfer

    def find_head(self, recipe: Recipe, size: InputSpec, progress: Progress) -> frozenset[str]:
        """Return the keys of the head for `recipe.backbone_lr`, or nothing if the recipe does not need them.

        Args:
            recipe: the recipe.
            size: the input of the network.
            progress: called with a note if the backbone has no trained weights.
        """
        if recipe.backbone_lr is None:
            return frozenset()
        if self.record is None:
            progress("note: the backbone learns slowly (backbone_lr) from random weights: start from trained --weights")
        return head_keys(self.architecture, size)


def find_starting_weights(
    weights: str | None,
    architecture: Architecture,
    weights_key: str | None,
    point: ResumePoint | None,
    distributed: Distributed,
) -> StartingWeights:
    """Return the weights that a run starts from. Those of a run that is resumed are not read again.

    Args:
        weights: the value of `--weights`, or None.
        architecture: the network.
        weights_key: the key of the weights in a file with several sets.
        point: the checkpoint that the run resumes from, or None.
        distributed: the processes that train together. One on each machine downloads the weights.

    Raises:
        UsageError: the resumed run started from other weights, or see `load_pretrained`.
        ModelFileError: see `load_pretrained`.
    """
    if point:
        record = point.record.weights
        if weights is not None:
            recorded = record.name if record else "of random numbers"
            require_same(point, "the weights", recorded, weights_name(weights, architecture))
        if record is not None:
            architecture = architecture._replace(input=point.checkpoint.spec.input, states_input=True)
        return StartingWeights(architecture, record)
    if weights is None:
        return StartingWeights(architecture)
    with distributed.main_process_first():
        pretrained = load_pretrained(weights, architecture, weights_key)
    if pretrained.input is not None:
        architecture = architecture._replace(input=pretrained.input, states_input=True)
    return StartingWeights(architecture, pretrained.record, pretrained)
