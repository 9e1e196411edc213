"""Export checkpoints to deployment formats, and check the parity of every artifact."""
