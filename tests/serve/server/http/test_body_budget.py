"""Of memory for bodies there is so much, whoever sends them."""

import pytest

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.body_budget import BODIES, BodyBudget


def test_refuses_what_has_no_room_and_takes_it_once_there_is_some() -> None:
    held = BodyBudget(10)
    for _ in range(BODIES):
        held.take(10)
    with pytest.raises(RequestError) as raised:
        held.take(1)
    assert raised.value.status == 503
    held.give_back(10)
    held.take(10)
