"""DialogSum: ROUGE-L against the best of three references.

  python -m gakd_jax.evaluate --config=configs/eval_summary.py --model=DIR

Greedy. The file is DialogSum's own, or `knkarthick/dialogsum:test` of the hub.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.data.max_length = 1024
  c.data.max_prompt_length = 768
  c.evals = {
    'dialogsum': base.greedy(
      'data/dialogsum/test.jsonl',
      task='summary',
      max_new_tokens=128,
      batch_size=64,
    )
  }
  return c
