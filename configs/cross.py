"""A teacher with another tokenizer, on Dolly: from pretrained models to tables.

  python -m gakd_jax.main --config=configs/cross.py:gpt2_qwen1p5,overlap
  python -m gakd_jax.main --config=configs/cross.py:gpt2_qwen1p5,all

SFT of both models, distillation from there by one method or by all, and the
test set. Pairs are MCW-KD's:

  gpt2_qwen1p5       GPT2-120M from Qwen1.5-1.8B
  gpt2_gpt2xl        GPT2-120M from GPT2-1.5B (one tokenizer)
  tinyllama_mistral  TinyLlama-1.1B from Mistral-7B, adapters
  gpt2xl_qwen2p5     GPT2-1.5B from Qwen2.5-7B-Instruct, adapters

Rates and epochs are those of DSKD (arXiv 2406.17328, Appendix), whose averages
over four sets of the first pair are: SFT 13.85, MultiLevelOT 14.37, ULD 15.36,
MinED 16.40, DSKD 16.68, DSKDv2 17.78. Hardware: one 80 GB GPU. Not yet run at
full size.
"""

from configs import dolly
from gakd_jax import UserError

_LORA = {'rank': 256, 'alpha': 8.0, 'dropout': 0.1, 'targets': '.*'}
_GPT2 = {'lora': None, 'learning_rate': 5e-4, 'epochs': 20}
_LARGE = {'lora': _LORA, 'learning_rate': 1e-3, 'epochs': 10}
_SMALL_TEACHER = {'lora': None, 'learning_rate': 1e-5, 'epochs': 10}

# Teacher and student, and how each is fine-tuned.
PAIRS = {
  'gpt2_qwen1p5': (
    ('Qwen/Qwen1.5-1.8B', _SMALL_TEACHER),
    ('openai-community/gpt2', _GPT2),
  ),
  'gpt2_gpt2xl': (
    ('openai-community/gpt2-xl', _SMALL_TEACHER | {'learning_rate': 5e-5}),
    ('openai-community/gpt2', _GPT2),
  ),
  'tinyllama_mistral': (
    ('mistralai/Mistral-7B-v0.1', _LARGE),
    ('TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T', _LARGE),
  ),
  'gpt2xl_qwen2p5': (
    ('Qwen/Qwen2.5-7B-Instruct', _LARGE),
    ('openai-community/gpt2-xl', _LARGE),
  ),
}
METHODS = {
  'uld': {'name': 'uld'},
  'mined': {'name': 'mined'},
  'dskd': {'name': 'dskd_cma'},
  'dskd_v2': {'name': 'dskd_v2'},
  'mcw': {'name': 'mcw'},
  'mcw_semi_dual': {'name': 'mcw', 'solver': 'semi_dual'},
  'multilevel_ot': {'name': 'multilevel_ot'},
  'overlap': {'name': 'overlap'},
  'gold': {'name': 'gold', 'kd': 0.5},
  'alm': {'name': 'alm'},
  'xtoken': {'name': 'xtoken'},
}


def get_config(which='gpt2_qwen1p5,overlap'):
  pair, _, method = which.partition(',')
  if pair not in PAIRS or method not in (*METHODS, 'all'):
    raise UserError(
      f'configs/cross.py:{which}: expected <pair>,<method>, of '
      f'{", ".join(PAIRS)} and {", ".join(METHODS)}, all'
    )
  teacher, student = PAIRS[pair]
  first = _stage(*student, {'name': 'sft'})
  first.checkpoint.best_metric = 'loss/ce'
  methods = METHODS if method == 'all' else {method: METHODS[method]}
  return dolly.pipeline(
    _stage(*teacher, {'name': 'sft'}),
    first,
    {
      name: _stage(None, student[1], objective)
      for name, objective in methods.items()
    },
    one_tokenizer=pair == 'gpt2_gpt2xl',
  )


def _stage(path, settings, objective):
  c = dolly.stage(path, objective, template='alpaca', **settings)
  if objective['name'] in ('dskd_cma', 'dskd_v2', 'mcw'):
    c.optimizer.extra_learning_rate = 1e-3
  return c
