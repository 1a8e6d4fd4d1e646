"""Makes configs/assets/tiny_student: a tokenizer and a shape, no weights.

python tools/make_tiny_student.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gakd_jax import binary
from gakd_jax.models import DecoderConfig, families
from tools import synthetic

PATH = Path(__file__).parents[1] / 'configs/assets/tiny_student'
SHAPE = DecoderConfig(
  vocab_size=640,
  width=96,
  layers=3,
  heads=3,
  kv_heads=1,
  head_dim=32,
  ff_width=256,
  tied_head=True,
  rope_theta=10000.0,
  norm_eps=1e-6,
  max_length=512,
)


def _main(argv):
  del argv
  synthetic.train_pieces(PATH, SHAPE.vocab_size)
  config = families.FAMILIES['qwen3'].to_hf(SHAPE)
  (PATH / 'config.json').write_text(json.dumps(config, indent=2) + '\n')


if __name__ == '__main__':
  binary.guarded(_main, sys.argv)
