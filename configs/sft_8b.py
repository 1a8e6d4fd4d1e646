"""SFT of Qwen3-8B on Dolly: the teacher of all Qwen3 recipes.

  python -m gakd_jax.main --config=configs/sft_8b.py

It is configs/gakd.py:sft,8b, where all of these are described.
"""

from configs import gakd


def get_config():
  return gakd.get_config('sft,8b')
