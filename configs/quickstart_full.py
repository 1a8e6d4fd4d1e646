"""The quickstart with more of everything, for numbers with a spread.

  python -m gakd_jax.main --config=configs/quickstart_full.py

Three seeds, and two methods more: reverse KL, and GAKD, of which reverse KL is
the ablation, g = 0.
"""

from configs import quickstart


def get_config():
  return quickstart.get_config(seeds=3, methods=tuple(quickstart.OBJECTIVES))
