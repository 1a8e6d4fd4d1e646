"""Nepali to English (FLORES v1): BLEU and chrF.

  python -m gakd_jax.evaluate --config=configs/eval_translation.py --model=DIR

Greedy. `--config=configs/eval_translation.py:comet` adds COMET, for which
`pip install 'gakd_jax[comet]'` brings PyTorch and the hub a checkpoint.
tools/prepare_data.py says how rows are made of two texts.
"""

from configs import base


def get_config(extra=''):
  c = base.get_config()
  c.evals = {
    'flores': base.greedy(
      'data/flores_ne_en/test.jsonl', task='translation', max_new_tokens=128
    )
  }
  if extra == 'comet':
    c.evals.comet = {'of': 'flores'}
  elif extra:
    raise ValueError(f'no extra {extra!r}; there is comet')
  return c
