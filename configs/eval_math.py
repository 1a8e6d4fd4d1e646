"""Math word problems: the accuracy of the number (or letter) answered.

  python -m gakd_jax.evaluate --config=configs/eval_math.py --model=DIR

Greedy. GSM8K, and LLM-Adapters' files of the others (arXiv 2304.01933), from
whose `dataset` folder they are read. With `--config.teacher.path`, whether both
answer the same and how alike their rationales are (ACL 2025), on GSM8K.
`--config=configs/eval_math.py:llm_adapters` reads all answers as the code of
LLM-Adapters does: the last number, the first capital A to E.
"""

from configs import base
from gakd_jax import UserError

ADAPTERS = 'data/llm_adapters/dataset'
SETS = {
  'addsub': ('AddSub', 'math'),
  'multiarith': ('MultiArith', 'math'),
  'singleeq': ('SingleEq', 'math'),
  'svamp': ('SVAMP', 'math'),
  'mawps': ('mawps', 'math'),
  'aqua': ('AQuA', 'aqua'),
}


def get_config(protocol='field'):
  if protocol not in ('field', 'llm_adapters'):
    raise UserError(
      f'configs/eval_math.py:{protocol}: known are field, llm_adapters'
    )

  def rule(task):
    if protocol == 'field':
      return task
    return 'llm_adapters_aqua' if task == 'aqua' else 'llm_adapters_math'

  c = base.get_config()
  c.evals = {
    name: base.greedy(f'{ADAPTERS}/{folder}/test.json', task=rule(task))
    for name, (folder, task) in SETS.items()
  }
  c.evals.gsm8k = base.greedy('data/gsm8k/test.jsonl', task=rule('gsm8k'))
  c.report.averages = {'math average': (*SETS, 'gsm8k')}
  c.evals.fidelity = {'of': 'gsm8k', 'batch_size': 32}
  return c
