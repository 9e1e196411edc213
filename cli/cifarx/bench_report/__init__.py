"""Reports of `cifarx bench`: tables, files, plots, comparison with a baseline, and the choice of a row."""
