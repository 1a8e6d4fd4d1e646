"""What is measured of a model: see `evaluator`."""
