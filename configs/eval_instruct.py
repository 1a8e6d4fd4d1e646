"""Instruction sets by MiniLLM's protocol (arXiv 2306.08543).

  python -m gakd_jax.evaluate --config=configs/eval_instruct.py \\
    --model=runs/sft_0p6b,runs/rgan_0p6b --config.teacher.path=runs/sft_8b/best

Sampled answers to five seeds, scored against the best of all references;
`--config=configs/eval_instruct.py:reference` is what GAKD's authors report: one
seed, and the first reference only. With a teacher, fidelity on Dolly as well.
With `--config.evals.dolly.task=minillm`, exact match is that of MiniLLM's code.
`python tools/prepare_data.py SOURCE FILE` brings the files.
"""

from configs import base

SETS = {
  'dolly': 'data/dolly/test.jsonl',
  'self_inst': 'data/self_inst/test.jsonl',
  'vicuna': 'data/vicuna/test.jsonl',
  'sinst': 'data/sinst_11/test.jsonl',
  'uinst': 'data/uinst_11/test.jsonl',
}


def get_config(protocol='field'):
  c = base.get_config()
  settings = {}
  if protocol == 'reference':
    settings = {'seeds': (10,), 'first_reference': True}
  elif protocol != 'field':
    raise ValueError(f'no protocol {protocol!r}; known are field, reference')
  c.evals = {
    name: base.generation(data, **settings) for name, data in SETS.items()
  }
  c.report.averages = {'instruct average': tuple(SETS)}
  c.evals.uinst.limit = 10_000  # the rows of it that the field uses
  c.evals.fidelity = {'of': 'dolly', 'batch_size': 32}
  return c
