"""Classifies the images of a Ray Data dataset of any size: each actor of the cluster opens the model once.

    from cifarx_serve.ray_data import classify

    images = ray.data.read_parquet("images/")
    classify(images, "lzh_9.onnx", column="image").write_parquet("predictions/")

Ray Data reads, distributes, retries and writes; this module adds what happens to a batch.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cifarx_serve.errors import ImageError, UsageError
from cifarx_serve.predictor import Prediction, load
from cifarx_serve.spec import ModelSpec
from cifarx_serve.system.cpus import set_cpu_limit
from cifarx_serve.system.terminal import encodable

try:
    import pyarrow as pa
    import ray.data
except ModuleNotFoundError as error:
    raise UsageError("Ray Data is not installed", 'pip install "cifarx[ray]"') from error

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy, Dataset

COLUMNS: Final = ("predicted_label", "predicted_index", "predicted_score", "prediction_error")
"""The columns that every result has."""

OPTIONAL_COLUMNS: Final = ("predicted_top", "predicted_labels")
"""The columns of `top_k` above 1, and of models with several labels."""

_CANDIDATES: Final = pa.list_(pa.struct({"label": pa.string(), "index": pa.int32(), "score": pa.float64()}))


def classify(
    dataset: "Dataset",
    model: str | Path,
    column: str = "image",
    *,
    backend: str | None = None,
    device: str = "auto",
    top_k: int = 1,
    keep_images: bool = False,
    batch_size: int = 64,
    num_cpus: float = 1,
    num_gpus: float = 0,
    actors: "ActorPoolStrategy | None" = None,
) -> "Dataset":
    """Add the predictions of a model to a dataset, lazily as every transform of Ray Data.

    The result has a row for each row of the dataset, with its other columns and these: `predicted_label`, string;
    `predicted_index`, int32; `predicted_score`, float64; and `prediction_error`, string. For an image that cannot be
    read, the error is set and the others are null. With `top_k` above 1, `predicted_top` is a list of structs of
    `label`, `index` and `score`. For a model with several labels, `predicted_labels` is such a list too.

    Args:
        dataset: a dataset with a column of images.
        model: a checkpoint or an artifact, at the same path on every node.
        column: the column of the images: contents of image files, paths that exist on every node, arrays as
            `Predictor.predict` takes them, or structs of `bytes` and `path` as Hugging Face writes them.
        backend, device: as for `cifarx.load`.
        top_k: the number of classes to return.
        keep_images: whether to keep a column of contents or arrays too. Paths are always kept.
        batch_size: the number of rows per batch.
        num_cpus, num_gpus: the CPUs and GPUs of each actor. The model runs in as many threads as it has CPUs.
        actors: the number of actors, such as `ray.data.ActorPoolStrategy(size=8)`. By default there is at least one,
            and as many more as the cluster has room for.

    Raises:
        UsageError: the dataset has no such column, or has a column of the result already.
    """
    names = dataset.columns() or []
    if column not in names:
        raise UsageError(f"the dataset has no column {column!r}", f"name one of {', '.join(names)}")
    if taken := [name for name in (*COLUMNS, *OPTIONAL_COLUMNS) if name in names]:
        raise UsageError(f"the dataset has a column {taken[0]!r} already", "rename or drop it")
    return dataset.map_batches(
        Classifier,
        fn_constructor_kwargs={
            "model": os.path.abspath(model),  # noqa: PTH100 - keeps symbolic links
            "column": column,
            "backend": backend,
            "device": device,
            "top_k": top_k,
            "keep_images": keep_images,
        },
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=actors or ray.data.ActorPoolStrategy(min_size=1),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


class Classifier:
    """The predictor of one actor. For the arguments see `classify`."""

    def __init__(
        self, model: str, column: str, *, backend: str | None, device: str, top_k: int, keep_images: bool
    ) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        set_cpu_limit(max(1, int(cpus)))  # the other CPUs of the node are those of other actors
        self._predictor = load(model, backend, device)
        self._column = column
        self._top_k = top_k
        self._keep_images = keep_images

    def __call__(self, table: "pa.Table") -> "pa.Table":
        """Return a batch with its predictions."""
        images = table[self._column]
        found = self._predictor.predict(map(_source, images.to_pylist()), self._top_k)
        if not self._keep_images and not _are_paths(images.type):
            table = table.drop_columns([self._column])
        for name, values in _columns(found, self._predictor.spec, self._top_k).items():
            table = table.append_column(name, values)
        return table


def _are_paths(kind: "pa.DataType") -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _source(value: Any) -> Any:
    """Return the image in a cell: the bytes or the path of a struct, or the value itself."""
    if not isinstance(value, dict):
        return value
    content = value.get("bytes")
    return value.get("path") if content is None else content


def _columns(found: list[Prediction | ImageError], spec: ModelSpec, top_k: int) -> "dict[str, pa.Array]":
    """Return the columns of predictions; those of errors are null."""
    predictions = [entry if isinstance(entry, Prediction) else None for entry in found]
    errors = [encodable(str(entry)) if isinstance(entry, ImageError) else None for entry in found]
    columns = {
        "predicted_label": pa.array([one and one.label for one in predictions], pa.string()),
        "predicted_index": pa.array([one and one.index for one in predictions], pa.int32()),
        "predicted_score": pa.array([one and one.score for one in predictions], pa.float64()),
    }
    if top_k > 1:
        columns["predicted_top"] = _candidates([one and one.top for one in predictions])
    if spec.multi_label:
        columns["predicted_labels"] = _candidates([one and one.labels for one in predictions])
    return {**columns, "prediction_error": pa.array(errors, pa.string())}


def _candidates(rows: list[Any]) -> "pa.Array":
    fields = [
        None if row is None else [{"label": one.label, "index": one.index, "score": one.score} for one in row]
        for row in rows
    ]
    return pa.array(fields, _CANDIDATES)
