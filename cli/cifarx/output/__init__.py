"""What the commands print: notes, tables, predictions, parity reports and training progress."""
