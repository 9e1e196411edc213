"""The `cifarx train` command."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from cifarx.model_flags import NO_INPUT_FLAGS, SOURCE_HELP, InputFlags, WeightsKey, model_options, takes_flags
from cifarx.option_values import parse_class_weights
from cifarx.options import (
    Broken,
    DataName,
    DeviceName,
    Json,
    Labels,
    OnError,
    SplitFraction,
    data_source,
    resolve_on_error,
)
from cifarx.output.console import json_result, note, result
from cifarx_serve.errors import UsageError

if TYPE_CHECKING:
    from cifarx_train.trainer import TrainResult

_NAMED_DATA: Final = ("auto", "builtin", "cifar10")


@takes_flags(InputFlags)
def command(
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help=SOURCE_HELP)] = None,
    flags: InputFlags = NO_INPUT_FLAGS,
    data: DataName = "auto",
    split: SplitFraction = None,
    labels: Labels = None,
    on_error: OnError = None,
    broken: Broken = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Recipe: notes (also called baseline), fast, finetune for --weights, or a TOML file. [default: notes]",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="default|FILE|timm",
            help="Start from weights: those that torchvision or timm publish for the network, or a checkpoint of any "
            "program. The head is replaced for the classes of the data.",
        ),
    ] = None,
    weights_key: WeightsKey = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Do not train parameters with such names, as 'layer1.*'. Repeatable."),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Learn from the answers of a checkpoint or artifact too (distillation)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs. [default: from the recipe]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Batch size, summed over all processes. [default: from the recipe]")
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(help="Batches whose gradients are added up in a step, as if they were one. [default: 1]"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [default: from the recipe]")] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(
            metavar="auto|FILE",
            help="Multiply the loss of an image by a weight of its class: auto is the inverse of its number of "
            "training images; FILE is JSON, TOML or CSV of class names and numbers.",
        ),
    ] = None,
    sampler: Annotated[
        Literal["shuffle", "balanced"] | None,
        typer.Option(help="balanced draws equally many images of every class. [default: from the recipe]"),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Fit the temperature of the scores at the end: to the val split, or to a tenth of the training "
            "images, which are then not trained on.",
        ),
    ] = False,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"] | None,
        typer.Option(help="Precision of the forward and backward passes. [default: from the recipe]"),
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")] = False,
    max_minutes: Annotated[float | None, typer.Option(help="Stop training after this many minutes.")] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after this many epochs without a better accuracy on val, else test."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set any field of the recipe. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe as TOML, and do not train.")] = False,
    stem: Annotated[
        Literal["own", "small"],
        typer.Option(
            help="small replaces the first layers of a ResNet for 32x32 images: a 3x3 convolution with stride 1."
        ),
    ] = "own",
    device: DeviceName = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the initial weights, the shuffling and the augmentation.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the checkpoints.")] = Path(),
    logdir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for TensorBoard. [default: logs in --out]")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|FILE", help="Resume from a checkpoint; auto is the newest intact one in --out."),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(help="Keep only the checkpoints of this many last epochs, and the best one as NAME_best.pth."),
    ] = None,
    json: Json = False,
) -> None:
    """Train a model. One checkpoint per epoch is written: NAME_0.pth, NAME_1.pth and so on.

    To train with several processes: torchrun --nproc-per-node 2 -m cifarx train …
    """
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "freeze": ",".join(freeze) if freeze else None,
        "learning_rate": lr,
        "class_weights": None if class_weights is None else parse_class_weights(class_weights),
        "sampler": sampler,
        "calibrate": calibrate or None,
        "precision": precision,
        "compile": compile_ or None,
        "max_minutes": max_minutes,
        "patience": patience,
    }
    overrides = _parse_assignments(set_ or ()) | {field: value for field, value in options.items() if value is not None}
    if dry_run:
        _print_recipe(recipe or "notes", model, overrides, json)
        return
    if weights_key is not None and weights is None:
        raise UsageError(f"--weights-key {weights_key} is for --weights FILE", "give the file")
    chosen = model_options(model, flags)._replace(weights_key=weights_key)
    if chosen.model is None:
        raise chosen.missing_code_error() or UsageError("--model is missing", "give a model, such as --model lzh")
    note("loading PyTorch and the data")
    from cifarx.output.training import training_progress
    from cifarx_train.train import train

    trained = train(
        chosen,
        data=data_source(data, split, labels),
        on_error=resolve_on_error(on_error, broken),
        recipe_name=recipe,
        stem=stem,
        device=device,
        seed=seed,
        out=out,
        logdir=logdir,
        resume=resume,
        keep=keep,
        weights=weights,
        teacher=teacher,
        progress=note,
        callbacks=[training_progress()],
        **overrides,
    )
    if json:
        from cifarx.output.training import training_json

        json_result(training_json(trained))
    else:
        _print_result(trained, chosen.model, data)


def _print_result(trained: "TrainResult", model: str, data: str) -> None:
    from cifarx.output.training import accuracy_text

    tested, val_accuracy = trained.final.checkpoint, trained.final.val_accuracy
    if trained.stop_reason:
        note(f"note: stopped early: {trained.stop_reason}")
    epochs = "1 epoch" if trained.epochs == 1 else f"{trained.epochs} epochs"
    result(
        f"{tested}: {accuracy_text(trained.final.evaluation)} on {trained.data} after {epochs} on {trained.device}, "
        f"peak memory {trained.peak_memory_bytes / 2**20:,.0f} MiB"
    )
    if val_accuracy is not None:
        best = ", the best epoch of the run" if trained.best and trained.best[0] == tested else ""
        note(f"note: the val accuracy of {tested} is {val_accuracy:.2%}{best}")
    elif trained.best and trained.best[1] > trained.test_accuracy:
        note(f"note: the best checkpoint is {trained.best[0]} with {trained.best[1]:.2%}")
    source = ["--model", model] if ":" in model else []  # a file never names the code to run
    images = [] if data in _NAMED_DATA else ["--data", data]  # a checkpoint records no path
    note(f"next: {shlex.join(['cifarx', 'export', '--ckpt', str(tested), *source, '--format', 'onnx', *images])}")


def _parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Parse FIELD=VALUE arguments. The values stay text; the recipe converts them."""
    pairs = [text.partition("=") for text in texts]
    for field, equals, value in pairs:
        if not (field and equals and value):
            raise UsageError(f"--set {field}{equals}{value} is not FIELD=VALUE", "write it like --set momentum=0.9")
    return {field: value for field, _, value in pairs}


def _print_recipe(name: str, model: str | None, overrides: dict[str, Any], json: bool) -> None:
    """Print the recipe that training would use. This needs no PyTorch."""
    from cifarx_train.recipes import load_recipe

    chosen = load_recipe(name, model, overrides)
    if json:
        json_result(chosen)
    else:
        result(*chosen.to_toml().split("\n"))
