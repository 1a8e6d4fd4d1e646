"""The quickstart with more of everything, for numbers with a spread.

  python -m gakd_jax.main --config=configs/quickstart_full.py

Three seeds, 2400 teacher-answered prompts.
"""

from configs import quickstart


def get_config():
  return quickstart.get_config(prompts=2400, steps=200, seeds=3)
