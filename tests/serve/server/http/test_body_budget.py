import pytest

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.body_budget import MAX_BODIES, BodyBudget


def test_rejects_bytes_beyond_the_budget_until_some_are_released() -> None:
    budget = BodyBudget(10)
    for _ in range(MAX_BODIES):
        budget.acquire(10)
    with pytest.raises(RequestError) as raised:
        budget.acquire(1)
    assert raised.value.status == 503
    assert str(raised.value) == "no memory left for 1 more bytes of request bodies: try again in a second"
    budget.release(10)
    budget.acquire(10)
