"""SFT of Qwen3-0.6B on Dolly: the student that distillation starts from.

  python -m gakd_jax.main --config=configs/sft_0p6b.py

It is configs/gakd.py:sft,0p6b, where all of these are described.
"""

from configs import gakd


def get_config():
  return gakd.get_config('sft,0p6b')
