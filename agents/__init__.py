"""What is built with the library: agents from configurations, training runs, evaluation, checkpoints, curves."""
