"""LiteRT files, made from the network with litert-torch."""
