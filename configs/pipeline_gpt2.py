"""GPT2-1.5B to GPT2-120M, on Dolly, from pretrained models to a table.

  python -m gakd_jax.main --config=configs/pipeline_gpt2.py

MiniLLM's pair and template (arXiv 2306.08543): SFT of both, forward and reverse
KL, GAKD and its ablation, all weights trained; then the test set. Hardware: one
80 GB GPU. Published ROUGE-L of the student: SFT 23.3, forward KL 23.5, reverse
KL 23.8, MiniLLM 24.6. Not yet run at full size.
"""

from configs import dolly


def get_config():
  return dolly.pair(
    'openai-community/gpt2-xl',
    'openai-community/gpt2',
    template='alpaca',
    teacher_sft={'lora': None, 'learning_rate': 5e-5, 'epochs': 10},
    student_sft={'lora': None, 'learning_rate': 5e-4, 'epochs': 20},
    rate=5e-4,
  )
