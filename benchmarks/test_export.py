"""Export: the cost of the parity check over the bare exporter, and the memory of a large network."""

import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks.support.limits import require
from benchmarks.support.models import Models
from cifarx_export.export import export
from cifarx_export.formats.onnx.converter import DEFAULT_OPSET
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.benchmarking.timing import Runner, measure
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import available_cpus
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cifarx_train.data.selection import DATA_ENV_VAR, select_dataset
from cifarx_train.models.registry import get_architecture
from cifarx_train.train import train

ROUNDS = 3
MAX_RATIO = 2.0
MAX_BYTES = 4e9
MIN_INT8_SPEED_UP = 1.3
BATCH = 64


def test_export_and_parity_check_cost_at_most_twice_the_bare_exporter(
    models: Models, tmp_path: Path, notes: list[str], benchmark: Any
) -> None:
    """Both run in this process, in turns; both read the checkpoint and write a file."""
    data = "auto" if DATA_ENV_VAR in os.environ else "builtin"
    checkpoint = models.files["pytorch"]
    images = select_dataset(data).load("test", load_checkpoint(checkpoint).spec.input).images

    def ours() -> None:
        made = export(checkpoint, ["onnx"], data=data, out=tmp_path)[0]
        assert made.report.summary.passed
        assert made.report.summary.images == len(images)

    def bare() -> None:
        _bare_export(checkpoint, images, tmp_path / "bare.onnx")

    turns = [(_seconds(ours), _seconds(bare)) for _ in range(ROUNDS + 1)][1:]
    ratio = statistics.median(our / their for our, their in turns)
    our, their = (statistics.median(column) for column in zip(*turns, strict=True))
    notes.append(
        f"export to ONNX with its parity check on {len(images):,} images: {our:.1f} s; the bare exporter and one pass "
        f"of both models {their:.1f} s; ratio {ratio:.2f} (at most {MAX_RATIO:g}), median of {ROUNDS} turns"
    )
    benchmark.extra_info.update(ours_s=our, bare_s=their, ratio=ratio, images=len(images))
    benchmark.pedantic(ours, rounds=1)
    require(ratio <= MAX_RATIO, f"{ratio:.2f} is over {MAX_RATIO:g}")


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _bare_export(checkpoint: Path, images: np.ndarray, path: Path) -> None:
    """Call `torch.onnx.export`, then run every image through PyTorch and ONNX Runtime in batches of 64."""
    loaded = load_checkpoint(checkpoint)
    module, spec = loaded.build(), loaded.spec.input
    torch.onnx.export(
        module,
        (torch.rand(2, spec.channels, spec.height, spec.width),),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: "batch"},),
        input_names=["input"],
        output_names=["logits"],
        opset_version=DEFAULT_OPSET,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()  # the default counts CPUs outside the affinity of this process
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = normalize(images[start : start + BATCH], spec)
            module(torch.from_numpy(batch))
            session.run(None, {"input": batch})


@pytest.mark.timeout(900)
def test_int8_is_faster_on_cpus_with_vnni(tmp_path: Path, notes: list[str]) -> None:
    """Train ResNet-18 for one epoch on the built-in data and measure both precisions in turns."""
    done = train("resnet18", data="builtin", recipe_name="fast", epochs=1, out=tmp_path)
    plain, quantized = export(done.checkpoints[-1], ["onnx"], ["fp32", "int8"], data="builtin")
    assert plain.report.summary.passed
    assert quantized.report.summary.passed
    inputs = np.random.default_rng(0).random((BATCH, 3, 32, 32), dtype=np.float32)
    with open_backend(plain.path, device="cpu") as fp32, open_backend(quantized.path, device="cpu") as int8:
        runners = [Runner(name, partial(backend.run, inputs)) for name, backend in (("fp32", fp32), ("int8", int8))]
        slow, fast = measure(runners, seconds=3)
    ratio = slow.p50_us / fast.p50_us
    able = "vnni" in Path("/proc/cpuinfo").read_text(encoding="ascii")
    limit = f"at least {MIN_INT8_SPEED_UP:g}" if able else "no limit: this CPU has no VNNI"
    notes.append(
        f"resnet18 in int8: {ratio:.2f} times fp32 at batch {BATCH} ({limit}), agreement "
        f"{quantized.report.summary.agreement:.2%}, median of turns"
    )
    require(not able or ratio >= MIN_INT8_SPEED_UP, f"{ratio:.2f} is under {MIN_INT8_SPEED_UP:g}")


@pytest.mark.timeout(900)
def test_vgg16_is_exported_in_4_gb(tmp_path: Path, notes: list[str]) -> None:
    """The network has 134 million parameters, and the checkpoint a momentum buffer for each."""
    spec = ModelSpec(
        model="vgg16", class_names=tuple(select_dataset("builtin").class_names), input=get_architecture("vgg16").input
    )
    module = get_architecture("vgg16").build(len(spec.class_names))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_checkpoint(
        tmp_path / "vgg16_0.pth", Checkpoint(spec, module.state_dict(), {"optimizer": optimizer.state_dict()})
    )
    del module, optimizer
    command = [sys.executable, "-m", "cifarx", "export", "--ckpt", str(tmp_path / "vgg16_0.pth"), "--format", "onnx"]
    meter = [sys.executable, str(Path(__file__).parent / "support" / "process_cost.py"), "1"]
    measured = subprocess.run(
        [*meter, json.dumps([*command, "--data", "builtin", "--json"])], stdout=subprocess.PIPE, check=True
    )
    cost = json.loads(measured.stdout)[0]
    peak = cost["peak_kb"] * 1024
    assert json.loads(cost["output"])[0]["passed"]
    notes.append(
        f"export of vgg16 to ONNX with its parity check: {peak / 1e9:.2f} GB peak memory, {cost['wall_s']:.0f} s "
        f"(at most {MAX_BYTES / 1e9:g} GB)"
    )
    assert peak <= MAX_BYTES
