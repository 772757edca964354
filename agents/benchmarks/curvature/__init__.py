"""Curvature methods side by side: the experiments of the papers, cut to what a processor does within minutes."""
