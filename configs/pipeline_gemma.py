"""Gemma-7B to Gemma-2B, on Dolly, from pretrained models to a table.

  python -m gakd_jax.main --config=configs/pipeline_gemma.py

The pair of speculative distillation (arXiv 2410.11325), whose vocabulary of
256000 is the largest here. Hardware: one 80 GB GPU. Not yet run at full size.
"""

from configs import dolly


def get_config():
  return dolly.pair(
    'google/gemma-7b',
    'google/gemma-2b',
    template='alpaca',
    teacher_sft={'lora': dolly.LORA, 'learning_rate': 5e-6, 'epochs': 10},
    student_sft={'lora': None, 'learning_rate': 1e-5, 'epochs': 10},
    rate=5e-6,
  )
