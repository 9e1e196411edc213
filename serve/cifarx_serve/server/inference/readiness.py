"""Whether a worker can answer requests now."""

from typing import Literal, TypeAlias

from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.repository import ModelRepository, ModelState

State: TypeAlias = Literal[ModelState, "overloaded"]
"""The state of a worker: that of its models, or `overloaded` if large images wait and none is decoded."""


class Readiness:
    """The state that load balancers ask for.

    Args:
        repository: the models.
        decoder: decodes the images.
    """

    def __init__(self, repository: ModelRepository, decoder: ImageDecoder) -> None:
        self._repository = repository
        self._decoder = decoder

    @property
    def state(self) -> State:
        """The state now. Nothing is waited for."""
        state = self._repository.state
        return "overloaded" if state == "ready" and self._decoder.is_stuck else state
