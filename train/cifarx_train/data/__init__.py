"""Datasets, loaders and augmentation. Only `cifar10`, `augmentation` and `loaders` import PyTorch."""
