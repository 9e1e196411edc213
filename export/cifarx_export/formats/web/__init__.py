"""A directory with a page that runs the model in browsers."""
