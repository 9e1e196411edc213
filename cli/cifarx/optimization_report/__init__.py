"""The reports of `cifarx optimize`: its table on a terminal, and its page."""
