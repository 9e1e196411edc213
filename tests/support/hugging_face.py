"""Directories of Hugging Face, as `save_pretrained` writes them."""

from pathlib import Path
from typing import Any, Final

LABELS: Final = {0: "cat", 1: "dog", 2: "fox"}


def write_vit(folder: Path, **fields: Any) -> Path:
    """Write a small ViT with three classes and its processor, and return the folder.

    Args:
        folder: the directory to create.
        fields: fields that replace those of its configuration.
    """
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": LABELS, "label2id": {name: label for label, name in LABELS.items()}}
    config = ViTConfig(**{**small, **labels, "image_size": 32, "patch_size": 8, **fields})
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder
