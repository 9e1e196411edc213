"""The messages with which a worker asks the supervisor to load and unload models."""

from typing import Literal, TypeAlias

import msgspec

Action: TypeAlias = Literal["load", "unload"]


class ChangeRequest(msgspec.Struct, frozen=True, tag="change"):
    """Sent by a worker to the supervisor: load or unload all versions of a model."""

    id: int
    action: Action
    model: str


class ChangeReply(msgspec.Struct, frozen=True, tag="reply"):
    """The reply to a `ChangeRequest`, when every worker has done it. `error` says why a worker has not."""

    id: int
    error: tuple[str, str] | None
