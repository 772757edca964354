"""Curvature from the batch's own rows, without factors."""
