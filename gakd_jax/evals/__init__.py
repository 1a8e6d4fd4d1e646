"""What is measured of a model: see `evaluator`.

Empty, so that processes that only score (`tasks.Pool`) do without jax.
"""
