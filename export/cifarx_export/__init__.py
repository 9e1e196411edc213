"""From a checkpoint to artifacts, each proved before it gets its name."""
