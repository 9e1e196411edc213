"""One module a command; each holds a function `command`."""
