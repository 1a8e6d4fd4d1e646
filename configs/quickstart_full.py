"""The quickstart with more of everything, for numbers with a spread.

  python -m gakd_jax.main --config=configs/quickstart_full.py

Three seeds, 4500 teacher-answered prompts, 800 steps.
"""

from configs import quickstart


def get_config():
  return quickstart.get_config(prompts=4500, steps=800, seeds=3)
