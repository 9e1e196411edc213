"""Reading and writing files safely: atomic writes, checksums and archive checks."""
