"""Layers and initializations used by the models."""
