"""All evaluation suites at once.

  python -m gakd_jax.evaluate --config=configs/eval_all.py --model=DIR[,DIR...]

Each as its own config says, but for DialogSum, whose longer prompts lose their
middle here. Fidelity is that of Dolly.
"""

from configs import (
  eval_commonsense,
  eval_instruct,
  eval_math,
  eval_summary,
  eval_translation,
)


def get_config():
  c = eval_instruct.get_config()
  for suite in (eval_math, eval_commonsense, eval_summary, eval_translation):
    theirs = suite.get_config()
    for name, settings in theirs.evals.items():
      if name != 'fidelity':
        c.evals[name] = settings
    c.report.averages.update(theirs.report.averages)
  return c
