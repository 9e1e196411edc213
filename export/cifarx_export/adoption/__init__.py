"""Adoption of classifiers that other programs wrote: their files become files of cifarx, checked on real images."""
