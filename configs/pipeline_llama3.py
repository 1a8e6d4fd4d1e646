"""Llama-3.1-8B to Llama-3.2-1B, on Dolly, from pretrained models to a table.

  python -m gakd_jax.main --config=configs/pipeline_llama3.py

Base models without a chat template, hence Alpaca's. For 3B, set the path of the
stage `sft`. Hardware: one 80 GB GPU. Not yet run at full size.
"""

from configs import dolly


def get_config():
  return dolly.pair(
    'meta-llama/Llama-3.1-8B',
    'meta-llama/Llama-3.2-1B',
    template='alpaca',
    teacher_sft={'lora': dolly.LORA, 'learning_rate': 5e-6, 'epochs': 10},
    student_sft={'lora': None, 'learning_rate': 1e-5, 'epochs': 10},
    rate=5e-6,
  )
