"""Math word problems: the accuracy of the number (or letter) answered.

  python -m gakd_jax.evaluate --config=configs/eval_math.py --model=DIR

Greedy. GSM8K, and LLM-Adapters' files of the others (arXiv 2304.01933), from
whose `dataset` folder they are read. With `--config.teacher.path`, whether both
answer the same and how alike their rationales are (ACL 2025), on GSM8K.
"""

from configs import base

ADAPTERS = 'data/llm_adapters/dataset'
SETS = {
  'addsub': ('AddSub', 'math'),
  'multiarith': ('MultiArith', 'math'),
  'singleeq': ('SingleEq', 'math'),
  'svamp': ('SVAMP', 'math'),
  'mawps': ('mawps', 'math'),
  'aqua': ('AQuA', 'aqua'),
}


def get_config():
  c = base.get_config()
  c.evals = {
    name: base.greedy(f'{ADAPTERS}/{folder}/test.json', task=task)
    for name, (folder, task) in SETS.items()
  }
  c.evals.gsm8k = base.greedy('data/gsm8k/test.jsonl', task='gsm8k')
  c.evals.fidelity = {'of': 'gsm8k', 'batch_size': 32}
  return c
