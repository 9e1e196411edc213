"""Networks as their authors have them: a module, the author's own transform of an image, and the files they would save.

Nothing here uses cifarx. `network_table.py` exports these files and compares the artifacts with the modules.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from benchmarks.support import user_networks

Transform: TypeAlias = Callable[[Image.Image], Tensor]

CLASSES = 10
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SEED = 0
_BATCH_SIZE = 50
_MOST_EPOCHS, _MOST_EPOCHS_OF_LARGE_IMAGES = 40, 8
_LARGE_SIDE = 128  # pixels
_LEARNING_RATE = 1e-3


class Author(NamedTuple):
    """A network of an author.

    Attributes:
        module: returns logits, probabilities or one of the structures that authors return.
        transform: the author's transform of a Pillow image.
        command: the arguments of `cifarx export`, or of `cifarx adopt` for a file that is an artifact already.
        artifact: whether the author's file is an artifact.
        scores: takes the scores out of what the module returns.
    """

    module: nn.Module
    transform: Transform
    command: Sequence[str]
    artifact: bool = False
    scores: Callable[[Any], Tensor] = lambda returned: returned


class Entry(NamedTuple):
    """One network of the table: where it comes from, its name, and the function that makes it in a directory."""

    source: str
    name: str
    make: Callable[[Path, Sequence[Image.Image], Sequence[int]], Author]


def _uniform_and_noise_images() -> list[Image.Image]:
    """Return black, white, uniformly colored and noise images: 16 in all."""
    random = np.random.default_rng(_SEED)
    uniform = [np.zeros((1, 1, 3)), np.full((1, 1, 3), 255), *(random.integers(0, 256, (1, 1, 3)) for _ in range(6))]
    noise = [random.integers(0, 256, (80, 80, 3)) for _ in range(8)]
    return [Image.fromarray(np.broadcast_to(pixels, (80, 80, 3)).astype(np.uint8)) for pixels in (*uniform, *noise)]


def fit(
    module: nn.Module,
    transform: Transform,
    images: Sequence[Image.Image],
    labels: Sequence[int],
    scores: Callable[[Any], Tensor] = lambda returned: returned,
) -> nn.Module:
    """Train a network until it classifies most images correctly, or for a number of epochs.

    Images without an object join every batch and take no part in the loss. The statistics of a BatchNorm that has only
    seen drawings make the rounding errors on other images grow without bound.
    """
    pixels, expected = torch.stack([transform(image) for image in images]), torch.tensor(labels)
    others = torch.stack([transform(image) for image in _uniform_and_noise_images()])
    optimizer = torch.optim.AdamW(module.parameters(), lr=_LEARNING_RATE)
    module.train()
    for _ in range(_MOST_EPOCHS if pixels.shape[-1] < _LARGE_SIDE else _MOST_EPOCHS_OF_LARGE_IMAGES):
        correct = 0
        for chosen in torch.randperm(len(pixels)).split(_BATCH_SIZE):
            found = scores(module(torch.cat([pixels[chosen], others])))[: len(chosen)]
            loss = nn.functional.cross_entropy(found, expected[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            correct += int((found.argmax(1) == expected[chosen]).sum())
        if correct > 0.7 * len(pixels):
            break
    torch.optim.swa_utils.update_bn([torch.cat([batch, others]) for batch in pixels.split(_BATCH_SIZE)], module)
    return module.eval()


def plain_transform(side: int) -> Transform:
    """Return the transform of a network for small images: no normalization."""
    transform: Transform = transforms.Compose([transforms.Resize((side, side)), transforms.ToTensor()])
    return transform


def imagenet_transform(side: int) -> Transform:
    """Return the transform of ImageNet's validation, with the ratio 224/256 of the crop."""
    transform: Transform = transforms.Compose(
        [
            transforms.Resize(round(side * 256 / 224)),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD),
        ]
    )
    return transform


def _write_spec(path: Path, side: int, **fields: Any) -> Path:
    """Write what the author knows about a network with `imagenet_transform`."""
    input_ = {
        "height": side,
        "width": side,
        "resize": "shorter_side",
        "resize_to": round(side * 256 / 224),
        "mean": _IMAGENET_MEAN,
        "std": _IMAGENET_STD,
    }
    path.write_text(json.dumps({"input": input_, **fields}))
    return path


_PLAIN = ("--mean", "0,0,0", "--std", "1,1,1")


def registry(name: str, side: int = 32, normalized: bool = True) -> Entry:
    """Return a network of torchvision, saved as a state dict."""

    def make(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> Author:
        import torchvision

        torch.manual_seed(_SEED)
        transform = imagenet_transform(side) if normalized else plain_transform(side)
        module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
        fit(module, transform, images, labels)
        torch.save({"state_dict": module.state_dict(), "epoch": 3}, folder / "net.pth")
        described = (
            ("--spec", str(_write_spec(folder / "spec.json", side)))
            if normalized
            else ("--image-size", str(side), *_PLAIN)
        )
        return Author(module, transform, ("--ckpt", "net.pth", "--model", name, *described))

    return Entry("torchvision", f"{name} {side}", make)


def own(name: str, callable_: str, side: int = 32, *, gray: bool = False, pick: str = "") -> Entry:
    """Return a network of a user's own file, saved as a state dict."""

    def make(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> Author:
        shutil.copy(user_networks.__file__, folder / "networks.py")
        torch.manual_seed(_SEED)
        module = getattr(user_networks, callable_)()
        steps: list[Any] = [transforms.Grayscale()] if gray else []
        transform = transforms.Compose([*steps, transforms.Resize((side, side)), transforms.ToTensor()])
        scores: Callable[[Any], Tensor] = (lambda returned: returned[pick]) if pick else (lambda returned: returned)
        fit(module, transform, images, labels, scores)
        torch.save(module.state_dict(), folder / "net.pth")
        described = ("--color", "L", "--mean", "0", "--std", "1") if gray else _PLAIN
        command = (
            *("--ckpt", "net.pth", "--model", f"networks.py:{callable_}", "--image-size", str(side)),
            *described,
        )
        return Author(module, transform, command, scores=scores)

    return Entry("own file", name, make)


def whole(name: str, change: Callable[[nn.Module], None], described: str) -> Entry:
    """Return a changed network of torchvision, saved as a whole module."""

    def make(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> Author:
        import torchvision

        torch.manual_seed(_SEED)
        module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
        change(module)
        transform = imagenet_transform(32)
        fit(module, transform, images, labels)
        torch.save(module, folder / "net.pt")
        return Author(module, transform, ("--ckpt", "net.pt", "--spec", str(_write_spec(folder / "spec.json", 32))))

    return Entry("whole module", f"{name}, {described}", make)


def timm_network(name: str, side: int | None = None) -> Entry:
    """Return a network of timm with timm's own transform, saved as timm's training script does."""

    def make(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> Author:
        import timm
        from timm.data import create_transform, resolve_data_config

        torch.manual_seed(_SEED)
        is_transformer = side is not None and not name.startswith("convnext")
        module = timm.create_model(name, num_classes=CLASSES, **({"img_size": side} if is_transformer else {}))
        config = resolve_data_config({} if side is None else {"img_size": side}, model=module)
        transform = create_transform(**config, is_training=False)
        fit(module, transform, images, labels)
        torch.save({"arch": name, "state_dict": module.state_dict()}, folder / "net.pth.tar")
        size = () if side is None else ("--image-size", str(side))
        return Author(module, transform, ("--ckpt", "net.pth.tar", "--model", f"timm/{name}", *size))

    return Entry("timm", name if side is None else f"{name} {side}", make)


def hugging_face(name: str, config_class: str, processor: dict[str, Any], **options: Any) -> Entry:
    """Return a network of Hugging Face's transformers with its image processor, saved by `save_pretrained`."""

    def make(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> Author:
        import transformers

        torch.manual_seed(_SEED)
        names = {label: f"class {label}" for label in range(CLASSES)}
        config = getattr(transformers, config_class)(num_labels=CLASSES, id2label=names, **options)
        module = transformers.AutoModelForImageClassification.from_config(config)
        directory = folder / "model"
        directory.mkdir()
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))
        preprocess = transformers.AutoImageProcessor.from_pretrained(directory)

        def transform(image: Image.Image) -> Tensor:
            pixels: Tensor = preprocess(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
            return pixels

        def scores(returned: Any) -> Tensor:
            logits: Tensor = returned.logits
            return logits

        fit(module, transform, images, labels, scores)
        module.save_pretrained(directory)
        return Author(module, transform, ("--model", "hf/model"), scores=scores)

    return Entry("Hugging Face", name, make)


def safetensors_network(name: str) -> Entry:
    """Return a network of torchvision, saved as safetensors."""

    def make(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> Author:
        from safetensors.torch import save_file

        author = registry(name).make(folder, images, labels)
        save_file(author.module.state_dict(), folder / "net.safetensors")
        return author._replace(command=("--ckpt", "net.safetensors", *author.command[2:]))

    return Entry("safetensors", name, make)


def lightning(name: str) -> Entry:
    """Return a network of torchvision in the form of a Lightning checkpoint, with a weighted loss beside it."""

    def make(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> Author:
        author = registry(name).make(folder, images, labels)
        weights = {f"model.{key}": tensor for key, tensor in author.module.state_dict().items()}
        content = {
            "epoch": 3,
            "global_step": 1200,
            "pytorch-lightning_version": "2.6.0",
            "state_dict": {**weights, "criterion.weight": torch.ones(CLASSES)},
            "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [],
        }
        torch.save(content, folder / "last.ckpt")
        return author._replace(command=("--ckpt", "last.ckpt", *author.command[2:]))

    return Entry("Lightning", name, make)


class _Deployed(nn.Module):
    """A network as someone else exported it: channels last, pixels from 0 to 255, and probabilities."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        probabilities: Tensor = self.network(pixels.permute(0, 3, 1, 2) / 255).softmax(1)
        return probabilities


def adopted(name: str, kind: str) -> Entry:
    """Return an artifact that its author exported without cifarx."""

    def make(folder: Path, images: Sequence[Image.Image], labels: Sequence[int]) -> Author:
        author = registry(name, normalized=False).make(folder, images, labels)
        module = _Deployed(author.module).eval()
        example = torch.rand(2, 32, 32, 3) * 255
        transform = transforms.Compose(
            [transforms.Resize((32, 32)), lambda image: torch.from_numpy(np.asarray(image).copy()).float()]
        )
        spec = {
            "input": {"height": 32, "width": 32, "layout": "NHWC", "value_range": [0, 255]},
            "output": "probabilities",
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        if kind == "ONNX":
            torch.onnx.export(
                module,
                (example,),
                folder / "theirs.onnx",
                dynamo=True,
                dynamic_shapes=({0: "n"},),
                input_names=["pixels"],
                output_names=["scores"],
                external_data=False,
                verbose=False,
            )
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PyTorch has deprecated TorchScript
                torch.jit.save(torch.jit.trace(module, example), str(folder / "theirs.pt"))
        file = "theirs.onnx" if kind == "ONNX" else "theirs.pt"
        return Author(module, transform, (file, "--spec", "spec.json"), artifact=True)

    return Entry(f"adopted {kind}", name, make)


def _keep_pool(module: Any) -> None:
    module.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)


def _change_eps_and_activation(module: nn.Module) -> None:
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.BatchNorm2d):
            child.eps = 1e-3
        if isinstance(child, nn.ReLU):
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.SiLU())


def _stride_one(module: Any) -> None:
    module.features[0][0].stride = (1, 1)


_HF = {"do_resize": True, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGENET = {"image_mean": list(_IMAGENET_MEAN), "image_std": list(_IMAGENET_STD)}

ENTRIES: tuple[Entry, ...] = (
    own("PyTorch's CIFAR-10 tutorial", "Tutorial"),
    own("LSTM over rows", "Rows"),
    own("transformer encoder", "Attention"),
    own("dict of outputs", "Heads", pick="logits"),
    own("grayscale", "gray", 48, gray=True),
    registry("resnet18"),
    registry("resnet34", normalized=False),
    registry("mobilenet_v2"),
    registry("mobilenet_v3_small", 224),
    registry("efficientnet_b0", 96),
    registry("shufflenet_v2_x1_0", 224),
    registry("densenet121"),
    registry("regnet_y_400mf", 64),
    registry("mnasnet0_5", 96),
    registry("convnext_tiny"),
    whole("resnet18", _keep_pool, "3x3 stem, pool kept"),
    whole("resnet18", _change_eps_and_activation, "SiLU, eps 1e-3"),
    whole("mobilenet_v2", _stride_one, "stride 1"),
    timm_network("lcnet_050"),
    timm_network("mobilenetv3_small_050"),
    timm_network("convnext_atto", 64),
    timm_network("vit_tiny_patch16_224", 64),
    timm_network("deit_tiny_patch16_224", 64),
    timm_network("ghostnet_050"),
    timm_network("mixer_s32_224", 64),
    hugging_face(
        "ViT",
        "ViTConfig",
        {**_HF, **_HALF, "image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}},
        **{"image_size": 64, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3},
        intermediate_size=192,
    ),
    hugging_face(
        "ConvNeXT",
        "ConvNextConfig",
        {
            **_HF,
            **_IMAGENET,
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": 64},
            "crop_pct": 0.875,
        },
        **{"hidden_sizes": [24, 48, 96, 192], "depths": [1, 1, 2, 1], "image_size": 64},
    ),
    hugging_face(
        "Swin",
        "SwinConfig",
        {**_HF, **_IMAGENET, "image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}},
        **{"image_size": 64, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2},
    ),
    hugging_face(
        "MobileNetV2",
        "MobileNetV2Config",
        {
            **_HF,
            **_HALF,
            "image_processor_type": "MobileNetV2ImageProcessor",
            "size": {"shortest_edge": 72},
            "do_center_crop": True,
            "crop_size": {"height": 64, "width": 64},
        },
        image_size=64,
        depth_multiplier=0.5,
    ),
    safetensors_network("resnet18"),
    lightning("resnet18"),
    adopted("resnet18", "ONNX"),
    adopted("mobilenet_v2", "TorchScript"),
)
"""The networks of the table."""
