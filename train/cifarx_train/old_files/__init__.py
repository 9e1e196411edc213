"""`.pth` files that others wrote, read without running a byte of theirs."""
