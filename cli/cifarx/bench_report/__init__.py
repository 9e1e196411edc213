"""Reports of `cifarx bench`: tables, plots, pages, baselines and the pick."""
