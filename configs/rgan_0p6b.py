"""GAKD (relativistic) from Qwen3-8B to Qwen3-0.6B, both after SFT, on Dolly.

  python -m gakd_jax.main --config=configs/rgan_0p6b.py

It is configs/gakd.py:rgan,0p6b, where all of these are described.
"""

from configs import gakd


def get_config():
  return gakd.get_config('rgan,0p6b')
