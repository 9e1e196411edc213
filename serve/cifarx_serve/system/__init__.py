"""The machine and the process: CPUs, memory, versions and worker processes."""
