"""Qwen2.5-7B to Qwen2.5-1.5B, on Dolly, from pretrained models to a table.

  python -m gakd_jax.main --config=configs/pipeline_qwen2p5.py

Their vocabularies are padded to 152064 and 151936 rows: the 151936 that both
have are compared. For 0.5B, set the path of the stage `sft`. Hardware: one 80
GB GPU. Published ROUGE-L of 1.5B: teacher 31.4, SFT 28.1, reverse KL 28.4, GKD
28.9. Not yet run at full size.
"""

from configs import dolly


def get_config():
  return dolly.pair(
    'Qwen/Qwen2.5-7B',
    'Qwen/Qwen2.5-1.5B',
    template='chat',
    teacher_sft={'lora': dolly.LORA, 'learning_rate': 5e-6, 'epochs': 10},
    student_sft={'lora': None, 'learning_rate': 1e-5, 'epochs': 10},
    rate=5e-6,
  )
