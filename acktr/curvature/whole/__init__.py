"""Curvatures that look across layers, or at the network itself."""
