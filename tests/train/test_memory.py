import psutil
import pytest
import torch

from cifarx_train.memory import peak_memory


def test_a_cpu_counts_the_process() -> None:
    assert 0.9 * psutil.Process().memory_info().rss <= peak_memory(torch.device("cpu")) < psutil.virtual_memory().total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
def test_a_gpu_counts_tensors() -> None:
    device = torch.device("cuda")
    before = peak_memory(device)
    block = torch.ones(before + 2**20, dtype=torch.uint8, device=device)
    assert peak_memory(device) >= len(block)
