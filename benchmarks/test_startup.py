"""`cifarx infer` from process start to the prediction, compared with minimal scripts without and with PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.support.limits import require
from benchmarks.support.models import Models

ROUNDS = 20
MAX_RATIO = 1.25

TORCH_ROUNDS = 3
MIN_SPEED_UP = 8

SMALLEST_SCRIPT = """
import json
import sys
import numpy as np
import onnxruntime
from PIL import Image

image = Image.open(sys.argv[1]).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
batch = (np.asarray(image, np.float32) / 255).transpose(2, 0, 1)[None]
session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
logits = session.run(None, {"input": batch})[0][0]
scores = np.exp(logits - logits.max())
best = int(logits.argmax())
names = json.loads(session.get_modelmeta().custom_metadata_map["cifarx.spec"])["class_names"]
print(json.dumps({"index": best, "label": names[best], "score": float(scores[best] / scores.sum())}))
"""

SMALLEST_SCRIPT_WITH_TORCH = """
import json
import sys
import torch
from PIL import Image
from torchvision.transforms.v2 import Compose, Resize, ToDtype, ToImage

files = {"cifarx_spec.json": ""}
model = torch.jit.load(sys.argv[2], _extra_files=files).eval()
transform = Compose([Resize((32, 32)), ToImage(), ToDtype(torch.float32, scale=True)])
with torch.inference_mode():
    scores = model(transform(Image.open(sys.argv[1]).convert("RGB"))[None]).softmax(1)[0]
best = int(scores.argmax())
print(json.dumps({"index": best, "label": json.loads(files["cifarx_spec.json"])["class_names"][best]}))
"""


def test_infer_costs_little_more_than_the_smallest_script(models: Models, tmp_path: Path, notes: list[str]) -> None:
    infer, script_cost = _costs(models, tmp_path, SMALLEST_SCRIPT, models.files["onnxruntime"], ROUNDS)
    time_ratio = infer["wall_s"] / script_cost["wall_s"]
    memory_ratio = infer["peak_kb"] / script_cost["peak_kb"]
    notes.append(
        f"cifarx infer, start to prediction: {infer['wall_s'] * 1e3:.0f} ms, {infer['peak_kb'] / 1024:.0f} MiB; "
        f"a minimal script {script_cost['wall_s'] * 1e3:.0f} ms and {script_cost['peak_kb'] / 1024:.0f} MiB; "
        f"ratios {time_ratio:.2f} and {memory_ratio:.2f} (at most {MAX_RATIO}), medians of {ROUNDS} in turns"
    )
    prediction, script_prediction = json.loads(infer["output"])[0], json.loads(script_cost["output"])
    assert prediction["label"] == script_prediction["label"]
    assert prediction["score"] == pytest.approx(script_prediction["score"], abs=1e-5)
    require(time_ratio <= MAX_RATIO, f"{time_ratio:.2f} is over {MAX_RATIO}")
    assert memory_ratio <= MAX_RATIO


def test_infer_is_far_faster_than_a_script_with_pytorch(models: Models, tmp_path: Path, notes: list[str]) -> None:
    infer, script_cost = _costs(models, tmp_path, SMALLEST_SCRIPT_WITH_TORCH, models.files["torchscript"], TORCH_ROUNDS)
    speed_up = script_cost["wall_s"] / infer["wall_s"]
    notes.append(
        f"a minimal script with torch and torchvision: {script_cost['wall_s'] * 1e3:,.0f} ms and "
        f"{script_cost['peak_kb'] / 1024:.0f} MiB; cifarx infer is {speed_up:.1f} times as fast (at least "
        f"{MIN_SPEED_UP}), medians of {TORCH_ROUNDS} in turns"
    )
    assert json.loads(infer["output"])[0]["label"] == json.loads(script_cost["output"])["label"]
    require(speed_up >= MIN_SPEED_UP, f"{speed_up:.1f} times is under {MIN_SPEED_UP}")


def _costs(models: Models, folder: Path, text: str, model: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure `cifarx infer` and a script on one image, in turns; return the costs of both."""
    image, script = folder / "x.png", folder / "smallest.py"
    Image.fromarray(models.images[0]).resize((640, 480)).save(image)
    script.write_text(text)
    infer = str(Path(sys.executable).with_name("cifarx"))
    ours = [infer, "infer", str(image), "--model", str(models.files["onnxruntime"]), "--json"]
    theirs = [sys.executable, str(script), str(image), str(model)]
    meter = [sys.executable, str(Path(__file__).parent / "support" / "process_cost.py"), str(rounds)]
    # Both run from bytecode, as installed programs do; a setting of the caller could compile ours at every start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    command = [*meter, json.dumps(ours), json.dumps(theirs)]
    measured = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: tuple[dict[str, Any], dict[str, Any]] = tuple(json.loads(measured.stdout))
    return found
