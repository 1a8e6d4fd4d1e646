"""Eight sets of multiple choice, by what is answered and by likelihood.

  python -m gakd_jax.evaluate --config=configs/eval_commonsense.py --model=DIR

LLM-Adapters' files (arXiv 2304.01933), read from its `dataset` folder. `boolq`
and the like generate greedily, and the option that is named first counts;
`boolq_likelihood` takes the option whose text has the highest mean
log-probability, and needs no model that keeps to the format;
`--config.evals.boolq_likelihood.normalise=bytes` divides by its length instead.
"""

from ml_collections import config_dict

from configs import base

SETS = {
  'boolq': 'boolq',
  'piqa': 'piqa',
  'siqa': 'social_i_qa',
  'hellaswag': 'hellaswag',
  'winogrande': 'winogrande',
  'arc_easy': 'ARC-Easy',
  'arc_challenge': 'ARC-Challenge',
  'openbookqa': 'openbookqa',
}


def get_config():
  c = base.get_config()
  c.evals = {}
  for name, folder in SETS.items():
    data = f'data/llm_adapters/dataset/{folder}/test.json'
    c.evals[name] = base.greedy(data, task='choice', max_new_tokens=32)
    c.evals[f'{name}_likelihood'] = {
      'kind': 'multiple_choice',
      'data': data,
      'limit': config_dict.placeholder(int),
      'candidates': 'text',  # of the options, or their label
      'normalise': 'tokens',  # or 'bytes' or 'none': acc_norm, acc of lm-eval
      'batch_size': 32,
    }
  c.report.averages = {
    'choice average': tuple(SETS),
    'likelihood average': tuple(f'{name}_likelihood' for name in SETS),
  }
  return c
