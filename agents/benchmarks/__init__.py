"""Side-by-side measurements: whole training steps, single updates, and the curvature engine against its peers."""
