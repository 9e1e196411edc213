"""`cifarx train`"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cifarx.options import Broken, DataName, DeviceName, Json, OnError, resolve_on_error
from cifarx.output.console import json_result, note, result
from cifarx_serve.errors import UsageError


def command(
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="lzh, fastnet, or a torchvision classifier: resnet34, vgg16, …")
    ] = None,
    data: DataName = "auto",
    on_error: OnError = None,
    broken: Broken = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="notes, fast, or a TOML file. [default: notes]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="In place of the recipe's; over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate, in place of the recipe's.")] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Of the forward and backward pass.")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes of training.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better accuracy.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe; repeat it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe as TOML and train nothing.")] = False,
    stem: Annotated[
        Literal["own", "small"], typer.Option(help="small: ResNets get a 3x3 stride-1 stem, for 32x32 images.")
    ] = "own",
    image_size: Annotated[int | None, typer.Option(help="Pixels, in place of the network's own.")] = None,
    device: DeviceName = "auto",
    seed: Annotated[int, typer.Option(help="Of the first weights, the shuffling and the augmentation.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the checkpoints.")] = Path(),
    logdir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for TensorBoard. [default: logs in --out]")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|FILE", help="Go on from a checkpoint; auto: the newest good one in --out."),
    ] = None,
    keep: Annotated[
        int | None, typer.Option(help="Keep the checkpoints of so many epochs, and the best as NAME_best.pth.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a network and write one checkpoint an epoch: NAME_0.pth, NAME_1.pth and so on.

    Several processes: torchrun --nproc-per-node 2 -m cifarx train …
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
    settings = _assignments(set_ or ()) | {field: value for field, value in options.items() if value is not None}
    if dry_run:
        _show(recipe or "notes", model, settings, json)
        return
    if model is None:
        raise UsageError("no --model was given", "name a network, as --model lzh")
    note("loading PyTorch, then the data")
    from cifarx.output.training import training_progress
    from cifarx_train.train import train

    done = train(
        model,
        data=data,
        on_error=resolve_on_error(on_error, broken),
        recipe_name=recipe,
        stem=stem,
        image_size=image_size,
        device=device,
        seed=seed,
        out=out,
        logdir=logdir,
        resume=resume,
        keep=keep,
        callbacks=[training_progress()],
        **settings,
    )
    last = done.checkpoints[-1]
    if json:
        fields = ("checkpoints", "test_accuracy", "images_per_s", "epochs", "device")
        json_result({**{name: getattr(done, name) for name in fields}, "checkpoints": list(map(str, done.checkpoints))})
        return
    if done.stopped:
        note(f"note: stopped early: {done.stopped}")
    result(
        f"{last}: {done.test_accuracy:.2%} test accuracy on {done.data}, {done.epochs} epochs on {done.device}, "
        f"{done.peak_memory_bytes / 2**20:,.0f} MiB at most"
    )
    if done.best and done.best[1] > done.test_accuracy:
        note(f"note: the best was {done.best[0]} with {done.best[1]:.2%}")
    note(f"next: cifarx export --ckpt {last} --format onnx")


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE as fields and texts; the recipe says what each must be."""
    pairs = [text.partition("=") for text in texts]
    for field, equals, value in pairs:
        if not (field and equals and value):
            raise UsageError(f"--set {field}{equals}{value} sets nothing", "write it as --set momentum=0.9")
    return {field: value for field, _, value in pairs}


def _show(name: str, model: str | None, settings: dict[str, Any], json: bool) -> None:
    """The recipe as it would be used. Needs no PyTorch."""
    from cifarx_train.recipes import recipe

    chosen = recipe(name, model, settings)
    if json:
        json_result(chosen)
    else:
        result(chosen.to_toml())
