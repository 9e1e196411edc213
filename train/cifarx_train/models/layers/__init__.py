"""Layers of the built-in networks, and changes to the layers of any network."""
