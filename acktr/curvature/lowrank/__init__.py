"""Factors of wide layers in a few of their eigenvectors."""
