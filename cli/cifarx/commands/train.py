"""`cifarx train`"""

from pathlib import Path
from typing import Annotated

import typer

from cifarx.console import json_result, note, result
from cifarx.options import DataName, DeviceName, Json


def command(
    model: Annotated[str, typer.Option(metavar="NAME", help="The network: lzh.")],
    data: DataName = "auto",
    recipe: Annotated[str, typer.Option(metavar="NAME", help="notes: SGD at 0.01, batch 64, 10 epochs.")] = "notes",
    epochs: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, in place of the recipe's.")] = None,
    device: DeviceName = "auto",
    seed: Annotated[int, typer.Option(help="Of the first weights and of the shuffling.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the checkpoints.")] = Path(),
    logdir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for TensorBoard. [default: logs in --out]")
    ] = None,
    json: Json = False,
) -> None:
    """Train a network and write one checkpoint an epoch: NAME_0.pth, NAME_1.pth and so on."""
    note("loading PyTorch, then the data")
    from cifarx.training_progress import training_progress
    from cifarx_train.run import train

    done = train(
        model,
        data=data,
        recipe_name=recipe,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        device=device,
        seed=seed,
        out=out,
        logdir=logdir,
        observers=[training_progress()],
    )
    last = done.checkpoints[-1]
    if json:
        fields = ("checkpoints", "test_accuracy", "images_per_s", "epochs", "device")
        json_result({**{name: getattr(done, name) for name in fields}, "checkpoints": list(map(str, done.checkpoints))})
    else:
        result(f"{last}: {done.test_accuracy:.2%} test accuracy on {done.data}, {done.epochs} epochs on {done.device}")
        note(f"next: cifarx export --ckpt {last} --format onnx")
