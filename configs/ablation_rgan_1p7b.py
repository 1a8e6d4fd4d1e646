"""What `rgan_1p7b` would be without its critic: g = 0, all else the same.

  python -m gakd_jax.main --config=configs/ablation_rgan_1p7b.py

Every claim about the critic is a difference from this run.
Hardware: one 80 GB GPU.
Not yet run at full size.
"""

from configs import rgan_1p7b


def get_config():
  c = rgan_1p7b.get_config()
  c.objective.g = 0.0
  return c
