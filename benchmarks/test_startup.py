"""`cifarx infer` from start to answer, against the smallest script that does the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from limits import require
from measured_models import Models
from PIL import Image

ROUNDS = 10
MAX_RATIO = 1.5

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


def test_infer_costs_little_more_than_the_smallest_script(models: Models, tmp_path: Path, notes: list[str]) -> None:
    image, script, model = tmp_path / "x.png", tmp_path / "smallest.py", str(models.files["onnxruntime"])
    Image.fromarray(models.images[0]).resize((640, 480)).save(image)
    script.write_text(SMALLEST_SCRIPT)
    ours = [str(Path(sys.executable).with_name("cifarx")), "infer", str(image), "--model", model, "--json"]
    smallest = [sys.executable, str(script), str(image), model]

    meter = [sys.executable, str(Path(__file__).with_name("process_cost.py")), str(ROUNDS)]
    measured = subprocess.run([*meter, json.dumps(ours), json.dumps(smallest)], stdout=subprocess.PIPE, check=True)
    infer, script_cost = json.loads(measured.stdout)

    time_ratio = infer["wall_s"] / script_cost["wall_s"]
    memory_ratio = infer["peak_kb"] / script_cost["peak_kb"]
    notes.append(
        f"cifarx infer, start to answer: {infer['wall_s'] * 1e3:.0f} ms and {infer['peak_kb'] / 1024:.0f} MiB; the "
        f"smallest script {script_cost['wall_s'] * 1e3:.0f} ms and {script_cost['peak_kb'] / 1024:.0f} MiB; "
        f"ratios {time_ratio:.2f} and {memory_ratio:.2f} (at most {MAX_RATIO}), medians of {ROUNDS} in turns"
    )
    ours_said, script_said = json.loads(infer["output"])[0], json.loads(script_cost["output"])
    assert ours_said["label"] == script_said["label"]
    assert ours_said["score"] == pytest.approx(script_said["score"], abs=1e-5)
    require(time_ratio <= MAX_RATIO, f"{time_ratio:.2f} is over {MAX_RATIO}")
    assert memory_ratio <= MAX_RATIO
