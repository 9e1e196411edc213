"""The `cifarx train` command."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cifarx.model_flags import NO_INPUT_FLAGS, SOURCE_HELP, InputFlags, model_options, takes_flags
from cifarx.options import Broken, DataName, DeviceName, Json, OnError, resolve_on_error
from cifarx.output.console import json_result, note, result
from cifarx_serve.errors import UsageError

if TYPE_CHECKING:
    from cifarx_train.trainer import TrainResult


@takes_flags(InputFlags)
def command(
    model: Annotated[str | None, typer.Option(metavar="SOURCE", help=SOURCE_HELP)] = None,
    flags: InputFlags = NO_INPUT_FLAGS,
    data: DataName = "auto",
    on_error: OnError = None,
    broken: Broken = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Recipe: notes (also called baseline), fast, or a TOML file. [default: notes]"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs. [default: from the recipe]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Batch size, summed over all processes. [default: from the recipe]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [default: from the recipe]")] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"] | None,
        typer.Option(help="Precision of the forward and backward passes. [default: from the recipe]"),
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")] = False,
    max_minutes: Annotated[float | None, typer.Option(help="Stop training after this many minutes.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without a better test accuracy.")
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
        "learning_rate": lr,
        "precision": precision,
        "compile": compile_ or None,
        "max_minutes": max_minutes,
        "patience": patience,
    }
    overrides = _parse_assignments(set_ or ()) | {field: value for field, value in options.items() if value is not None}
    if dry_run:
        _print_recipe(recipe or "notes", model, overrides, json)
        return
    if model is None:
        raise UsageError("--model is missing", "give a model, such as --model lzh")
    note("loading PyTorch and the data")
    chosen = model_options(model, flags)
    from cifarx.output.training import training_progress
    from cifarx_train.train import train

    trained = train(
        chosen,
        data=data,
        on_error=resolve_on_error(on_error, broken),
        recipe_name=recipe,
        stem=stem,
        device=device,
        seed=seed,
        out=out,
        logdir=logdir,
        resume=resume,
        keep=keep,
        callbacks=[training_progress()],
        **overrides,
    )
    if json:
        fields = ("checkpoints", "test_accuracy", "images_per_s", "epochs", "device")
        values = {name: getattr(trained, name) for name in fields}
        json_result({**values, "checkpoints": list(map(str, trained.checkpoints))})
    else:
        _print_result(trained, model)


def _print_result(trained: "TrainResult", model: str) -> None:
    last = trained.checkpoints[-1]
    if trained.stop_reason:
        note(f"note: stopped early: {trained.stop_reason}")
    epochs = "1 epoch" if trained.epochs == 1 else f"{trained.epochs} epochs"
    result(
        f"{last}: {trained.test_accuracy:.2%} test accuracy on {trained.data} after {epochs} on {trained.device}, "
        f"peak memory {trained.peak_memory_bytes / 2**20:,.0f} MiB"
    )
    if trained.best and trained.best[1] > trained.test_accuracy:
        note(f"note: the best checkpoint is {trained.best[0]} with {trained.best[1]:.2%}")
    source = f" --model {model}" if ":" in model else ""  # a file never names the code to run
    note(f"next: cifarx export --ckpt {last}{source} --format onnx")


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
