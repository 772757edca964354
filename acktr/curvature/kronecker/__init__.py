"""Products of an input and an output moment, and what their eigenvectors are good for."""
