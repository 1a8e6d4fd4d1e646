"""What `gan_4b` would be without its critic: g = 0, all else the same.

  python -m gakd_jax.main --config=configs/ablation_gan_4b.py

Every claim about the critic is a difference from this run.
Hardware: one 80 GB GPU.
Not yet run at full size.
"""

from configs import gan_4b


def get_config():
  c = gan_4b.get_config()
  c.objective.g = 0.0
  return c
