"""Batch inference on a local Ray cluster that the tests start and stop."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from cifarx_serve.predictor import Prediction, load
from tests.serve.test_ray import local_ray, needs_ray, wait_started
from tests.support.color_model import write_onnx
from tests.support.documentation import find_pages

HEADER = """
import json, logging, sys
import pyarrow as pa, pyarrow.parquet as pq
import ray
ray.init(logging_level=logging.ERROR, log_to_driver=False)
context = ray.data.DataContext.get_current()
context.enable_progress_bars = False
from cifarx_serve.ray_data import classify
one = ray.data.ActorPoolStrategy(size=1)
folder = sys.argv[1]
"""


class Cluster(NamedTuple):
    """A local cluster, and a folder with a model and images."""

    folder: Path
    environment: dict[str, str]

    def run(self, code: str) -> Any:
        """Run code in a process that is connected to the cluster, and return the last line that it prints, as JSON."""
        command = [sys.executable, "-c", HEADER + code, str(self.folder)]
        ran = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray-data")
    write_onnx(folder / "colors.onnx")
    random = np.random.default_rng(0)
    for number in range(20):
        color = tuple(int(value) for value in random.integers(0, 256, 3))
        Image.new("RGB", (9, 5), color).save(folder / f"{number:02}.png")
    with local_ray(folder / "ray.log") as environment:
        wait_started(folder / "ray.log")
        yield Cluster(folder, environment)


def expected(folder: Path) -> list[Prediction]:
    with load(folder / "colors.onnx", device="cpu") as predictor:
        return [predictor.predict(path, 3) for path in sorted(folder.glob("*.png"))]


@needs_ray
@pytest.mark.slow
def test_parquet_in_and_out_with_bad_rows_kept(cluster: Cluster) -> None:
    """The images are contents, a null, a text and a Hugging Face struct; the other columns are kept."""
    code = """
paths = [f"{folder}/{number:02}.png" for number in range(20)]
contents = [open(path, "rb").read() for path in paths]
contents[3], contents[7] = None, b"not an image"
images = pa.table({"image": contents, "label": [f"true {n}" for n in range(20)], "id": list(range(20))})
pq.write_table(images, f"{folder}/images.parquet", row_group_size=5)
structs = pa.table({"image": [{"bytes": contents[0], "path": None}, {"bytes": None, "path": paths[1]}], "id": [0, 1]})
pq.write_table(structs, f"{folder}/structs.parquet")
found = []
for name in ("images", "structs"):
    read = ray.data.read_parquet(f"{folder}/{name}.parquet")
    classify(read, f"{folder}/colors.onnx", top_k=3, batch_size=4, actors=one).write_parquet(f"{folder}/{name}-out")
    found.append(pq.read_table(f"{folder}/{name}-out").sort_by("id").to_pylist())
print(json.dumps(found))
"""
    rows, structs = cluster.run(code)
    assert [row["id"] for row in rows] == list(range(20))
    assert list(rows[0]) == [
        *("label", "id", "predicted_label", "predicted_index", "predicted_score", "predicted_top", "prediction_error")
    ]
    predictions = expected(cluster.folder)
    for row, prediction in zip(rows, predictions, strict=True):
        assert row["label"] == f"true {row['id']}"
        if row["id"] in (3, 7):
            assert row["predicted_label"] is row["predicted_top"] is row["predicted_score"] is None
            problem = "None is not an image" if row["id"] == 3 else "12 bytes is not an image"
            assert row["prediction_error"].startswith(problem)
            continue
        assert (row["predicted_label"], row["predicted_index"]) == (prediction.label, prediction.index)
        assert row["predicted_score"] == pytest.approx(prediction.score, abs=1e-6)
        assert [one["label"] for one in row["predicted_top"]] == [one.label for one in prediction.top]
        assert row["prediction_error"] is None
    assert [row["predicted_label"] for row in structs] == [prediction.label for prediction in predictions[:2]]


@needs_ray
@pytest.mark.slow
def test_paths_and_arrays(cluster: Cluster) -> None:
    """Paths stay in the result, and arrays only if they are asked for."""
    code = """
paths = ray.data.from_items([{"path": f"{folder}/{number:02}.png"} for number in [0, 1, 99]])
arrays = ray.data.read_images(f"{folder}/01.png", include_paths=True)
found = [classify(paths, f"{folder}/colors.onnx", "path", actors=one).take_all()]
for keep in (False, True):
    rows = classify(arrays, f"{folder}/colors.onnx", keep_images=keep, actors=one).take_all()
    found.append([{"predicted_label": row["predicted_label"], "kept": "image" in row} for row in rows])
print(json.dumps(found))
"""
    by_path, dropped, kept = cluster.run(code)
    predictions = expected(cluster.folder)
    assert sorted(Path(row["path"]).stem for row in by_path) == ["00", "01", "99"]
    labels = {Path(row["path"]).stem: row["predicted_label"] for row in by_path}
    assert labels == {"00": predictions[0].label, "01": predictions[1].label, "99": None}
    assert [row["predicted_label"] for row in (*dropped, *kept)] == [predictions[1].label] * 2
    assert [row["kept"] for row in (*dropped, *kept)] == [False, True]


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("'path': 'x'", "the dataset has no column 'image': name one of path"),
        ("'image': 'x', 'predicted_label': 'y'", "the dataset has a column 'predicted_label' already: rename"),
    ],
)
def test_datasets_that_do_not_fit(cluster: Cluster, columns: str, problem: str) -> None:
    code = f"""
try:
    classify(ray.data.from_items([{{{columns}}}]), "colors.onnx")
except Exception as error:
    print(json.dumps(str(error)))
"""
    assert problem in cluster.run(code)


@needs_ray
@pytest.mark.slow
def test_the_documentation_runs(cluster: Cluster) -> None:
    (page,) = find_pages("docs/batch-inference.md")
    code = f"""
import os, shutil
os.makedirs(f"{{folder}}/docs/storage/images")
os.chdir(f"{{folder}}/docs")
shutil.copy("../colors.onnx", "storage/lzh_9.onnx")
for part in range(2):
    contents = [open(f"../{{number:02}}.png", "rb").read() for number in range(part, 20, 2)]
    pq.write_table(pa.table({{"image": contents}}), f"storage/images/part-{{part}}.parquet")
{page.python_script()}
rows = [pq.read_table(f"storage/{{name}}").num_rows for name in ("predictions", "parts")]
print(json.dumps([*rows, *sorted(os.listdir("storage/parts"))]))
"""
    assert cluster.run(code) == [20, 20, "part-0", "part-1"]


def test_without_ray_the_error_names_the_extra(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "try: import cifarx_serve.ray_data\nexcept Exception as error: print(error)"
    )
    assert fresh_python(code) == 'Ray Data is not installed: pip install "cifarx[ray]"'
