import psutil
import pytest
import torch

from cifarx_train.device_memory import free_device_memory, peak_device_memory

CPU = torch.device("cpu")


def test_on_a_cpu_the_peak_is_that_of_the_process() -> None:
    assert 0.9 * psutil.Process().memory_info().rss <= peak_device_memory(CPU) < psutil.virtual_memory().total


def test_on_a_cpu_no_free_memory_is_reported() -> None:
    assert free_device_memory(CPU) is None


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_that_of_the_tensors() -> None:
    device = torch.device("cuda")
    before = peak_device_memory(device)
    block = torch.ones(before + 2**20, dtype=torch.uint8, device=device)
    assert peak_device_memory(device) >= len(block)


@pytest.mark.gpu
def test_on_a_gpu_free_memory_is_reported() -> None:
    assert (free_device_memory(torch.device("cuda")) or 0) > 0
