"""Data sets. Nothing here needs PyTorch but the reader of CIFAR-10's own files and the batches on a device."""
