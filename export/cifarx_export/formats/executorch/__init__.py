"""ExecuTorch programs, for phones, embedded systems and CPUs."""
