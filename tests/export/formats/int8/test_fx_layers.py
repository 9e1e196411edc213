from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule, Interpreter, Node

from cifarx_export.formats.int8.fx_layers import count_elements, count_macs, find_layers

TOKENS, WIDTH = 5, 8


class BatchSecond(nn.Module):
    """Attention whose layers take (tokens, batch, width), as in torchvision, and a layer whose rows are all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.rows = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, _ = self.attention(x, x, x, need_weights=False)
        scores: torch.Tensor = self.rows(tokens.reshape(-1, WIDTH)).reshape(-1, TOKENS, 3).mean(1)
        return scores


class Sizes(Interpreter):
    """Runs a graph and keeps the number of elements of every activation."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.elements: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in n.meta["val"].shape):
            self.elements[n] = value.numel()
        return value


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    example = torch.zeros(2, TOKENS, WIDTH)
    program = torch.export.export(BatchSecond().eval(), (example,), dynamic_shapes=({0: Dim("batch", max=64)},))
    module = program.run_decompositions({}).module()
    assert isinstance(module, GraphModule)
    return module


def test_elements_are_those_of_one_image_wherever_the_batch_is(graph: GraphModule) -> None:
    sizes = Sizes(graph)
    sizes.run(torch.zeros(3, TOKENS, WIDTH))
    assert len(sizes.elements) > 10
    for node, elements in sizes.elements.items():
        assert type(count_elements(node)) is int
        assert count_elements(node) * 3 == elements, node


def test_multiplications_and_costs_are_plain_numbers(graph: GraphModule) -> None:
    macs = count_macs(graph)
    assert sorted(macs.values()) == sorted([TOKENS * WIDTH * 3 * WIDTH, TOKENS * WIDTH * WIDTH, TOKENS * WIDTH * 3])
    assert {type(count) for count in macs.values()} == {int}
    assert {type(layer.fp32_cost) for layer in find_layers(graph, ())} == {float}
