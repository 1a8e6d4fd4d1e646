"""What all Dolly experiments share: MiniLLM's split and protocol.

`python tools/prepare_data.py` puts the data where this looks for it.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.data.train = 'data/dolly/train.jsonl'
  c.data.validation = 'data/dolly/dev.jsonl'
  c.data.template = 'qwen3'
  c.data.max_length = 512
  c.data.max_prompt_length = 256
  c.train.batch_size = 32
  c.evals = {
    'loss': {'batch_size': 32},
    'generation': {'seeds': (10,), 'batch_size': 128},
  }
  c.checkpoint.best_metric = 'generation/rouge_l'
  return c
