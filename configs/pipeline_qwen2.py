"""Qwen2-7B to Qwen2-0.5B, on Dolly, from pretrained models to a table.

  python -m gakd_jax.main --config=configs/pipeline_qwen2.py

The second pair of speculative distillation (arXiv 2410.11325). Hardware: one 80
GB GPU. Not yet run at full size.
"""

from configs import dolly


def get_config():
  return dolly.pair(
    'Qwen/Qwen2-7B',
    'Qwen/Qwen2-0.5B',
    template='chat',
    teacher_sft={'lora': dolly.LORA, 'learning_rate': 5e-6, 'epochs': 10},
    student_sft={'lora': None, 'learning_rate': 1e-4, 'epochs': 20},
    rate=1e-4,
  )
