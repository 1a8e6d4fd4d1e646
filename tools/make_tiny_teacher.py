"""Makes configs/assets/tiny_teacher: tokenizer, training, export.

python tools/make_tiny_teacher.py
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import tiny_teacher
from gakd_jax import binary, train
from gakd_jax.models import DecoderConfig, families
from tools import synthetic

WORKDIR = 'runs/tiny_teacher'
SHAPE = DecoderConfig(
  vocab_size=768,
  width=160,
  layers=5,
  heads=5,
  kv_heads=1,
  head_dim=32,
  ff_width=448,
  tied_head=True,
  rope_theta=10000.0,
  norm_eps=1e-6,
  max_length=512,
)


def _main(argv):
  del argv
  path = Path(tiny_teacher.PATH)
  synthetic.train_tokenizer(path, SHAPE.vocab_size)
  config = families.FAMILIES['qwen3'].to_hf(SHAPE)
  (path / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  train.run(tiny_teacher.get_config(), WORKDIR)
  shutil.copytree(Path(WORKDIR) / 'best', path, dirs_exist_ok=True)


if __name__ == '__main__':
  binary.guarded(_main, sys.argv)
