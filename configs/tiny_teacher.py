"""The quickstart's teacher: a 1.5 M-parameter Qwen3 trained from scratch.

  python tools/make_tiny_teacher.py

makes its tokenizer, runs this config and puts the result (3.0 MB, bf16) into
configs/assets/tiny_teacher. 1600 steps, held-out greedy ROUGE-L 94.1.
"""

import os

from configs import base

PATH = os.path.join(os.path.dirname(__file__), 'assets', 'tiny_teacher')


def get_config():
  c = base.get_config()
  c.student.path = PATH
  c.student.shape = {}  # random weights in the architecture of PATH
  c.student.remat = 'none'
  c.data.train = 'python:tools.synthetic:rows:train:50000'
  c.data.validation = 'python:tools.synthetic:rows:validation:240'
  c.data.template = 'chat'
  c.data.max_length = 112
  c.data.max_prompt_length = 80
  c.data.buckets = (56, 72, 88, 112)
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup_steps = 50
  c.optimizer.weight_decay = 0.1
  c.train.steps = 1600
  c.train.batch_size = 48
  c.train.precision = 'float32'
  c.train.head_chunk = 2048
  c.evals = {
    'loss': {'batch_size': 60},
    'greedy': {
      'kind': 'generation',
      'temperature': 0.0,
      'seeds': (0,),
      'max_new_tokens': 72,
      'no_repeat_ngram': 0,
      'batch_size': 80,
    },
  }
  c.eval_every = 400
  return c
