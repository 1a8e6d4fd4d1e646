"""Forward KL from the SFT of Qwen3-8B to that of Qwen3-0.6B, on Dolly.

  python -m gakd_jax.main --config=configs/fkl_0p6b.py

It is configs/gakd.py:fkl,0p6b, where all of these are described.
"""

from configs import gakd


def get_config():
  return gakd.get_config('fkl,0p6b')
