"""Diagnosis of wrong preprocessing and a wrong order of the classes, by trying the usual ones on labeled images."""
