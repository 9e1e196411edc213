"""One module a runtime that can answer for a model file."""
