"""From pretrained Qwen3-8B and 0.6B to a table of distilled students, on Dolly.

  python -m gakd_jax.main --config=configs/pipeline_0p6b.py

Teacher SFT; student SFT, chosen by validation loss; from it forward KL, reverse
KL, GAKD and its ablation, chosen by validation ROUGE-L; then each best model
on the test set, five seeds. A stage that has finished is skipped on restart.
Hardware: eight 80 GB GPUs for the teacher's SFT; the rest needs one. Not yet
run at full size.
"""

from configs import (
  ablation_rgan_0p6b,
  base,
  dolly,
  fkl_0p6b,
  rgan_0p6b,
  rkl_0p6b,
  sft_0p6b,
  sft_8b,
)

METHODS = {
  'forward_kl': fkl_0p6b,
  'reverse_kl': rkl_0p6b,
  'rgan': rgan_0p6b,
  'rgan_without_critic': ablation_rgan_0p6b,
}


def get_config():
  c = base.get_config()
  stages = [('teacher', sft_8b.get_config()), ('sft', sft_0p6b.get_config())]
  for name, module in METHODS.items():
    stage = module.get_config()
    stage.student.path = 'stage:sft'
    stage.teacher.path = 'stage:teacher'
    stages.append((name, stage))
  for name in ('teacher', 'sft', *METHODS):
    stages.append((f'test_{name}', _test(name)))
  c.stages = tuple(stages)
  return c


def _test(name):
  """The best model of a stage on the test set, with the field's protocol."""
  c = dolly.get_config()
  c.student.path = f'stage:{name}'
  c.train.steps = 0
  c.data.train = None
  c.evals = {
    'loss': {'data': 'data/dolly/test.jsonl', 'batch_size': 32},
    'generation': {'data': 'data/dolly/test.jsonl', 'batch_size': 128},
  }
  c.checkpoint.best_metric = None
  return c
