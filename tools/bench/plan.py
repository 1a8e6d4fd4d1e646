"""What `--plan` says of a step's memory, beside what the step takes.

  python -m tools.bench.plan

V = 151936, students of 2 x 128 and 4 x 256, teachers of 4 x 256, 4 rows of 256
tokens, fp32, AdamW. Each step runs in a process of its own, which loads it from
the compilation cache: what the compiler itself needs is not the step's. Its
peak is that of resident memory (VmHWM, reset before the first step) above
what the process had with the step loaded and no array made. GB and the ratio
plan / peak are printed as JSON. The peak is above the plan by up to the logits
of one chunk of one model, 0.08 GB here: memory that is allocated while the
step runs and is not in the compiler's count. The plan equals that count.
"""

import argparse
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

V, B, T = 151936, 4, 256
SMALL, LARGE = {'width': 128, 'layers': 2}, {'width': 256, 'layers': 4}
CHUNK = 128
OBJECTIVES = {
  'sft': {'name': 'sft'},
  'rkl': {'name': 'kld', 'divergence': 'reverse_kl'},
  'rgan': {'name': 'gakd', 'kind': 'rgan'},
}
CASES = {
  f'{name}_{student["width"]}': (objective, student)
  for student in (SMALL, LARGE)
  for name, objective in OBJECTIVES.items()
}


def config_of(case, folder):
  """The case as a config, its models as directories without weights."""
  from configs import base

  objective, student = CASES[case]

  def model(name, shape):
    hf = {
      'model_type': 'qwen3',
      'vocab_size': V,
      'hidden_size': shape['width'],
      'num_hidden_layers': shape['layers'],
      'num_attention_heads': shape['width'] // 64,
      'num_key_value_heads': 2,
      'head_dim': 64,
      'intermediate_size': 3 * shape['width'],
      'tie_word_embeddings': True,
    }
    path = Path(folder) / name
    path.mkdir(exist_ok=True)
    (path / 'config.json').write_text(json.dumps(hf))
    return str(path)

  c = base.get_config()
  c.student.path = model('student', student)
  if objective['name'] != 'sft':
    c.teacher.path = model('teacher', LARGE)
  c.teacher.dtype = c.train.precision = 'float32'
  c.objective = objective
  c.train.batch_size, c.train.head_chunk, c.train.steps = B, CHUNK, 10
  c.data.max_length = T
  return c


def measure(case, folder, steps=3):
  """Plans the step, runs it; GB of both."""
  import jax
  import numpy as np

  from gakd_jax import build, plan, sharding
  from gakd_jax import training as training_lib
  from gakd_jax.data.pipeline import Batch, Tokens

  config = config_of(case, folder)
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    planned = plan.make(config, mesh)
    run = build.abstract(config, mesh)
    gc.collect()
    before = resident('VmRSS')

    def random(tree):
      rng = np.random.default_rng(0)
      return jax.tree.map(
        lambda x: jax.device_put(
          0.02 * rng.standard_normal(x.shape, np.float32), x.sharding
        ),
        tree,
      )

    places = sharding.abstract(run.shapes, mesh)
    run = dataclasses.replace(run, start=lambda: random(places))
    state = training_lib.make(run, 0, 10).init()
    models = dataclasses.replace(run.models, frozen=random(run.models.frozen))
    ids_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    mask_BT = np.arange(T)[None, :].repeat(B, 0) > 0
    tokens = Tokens(ids_BT, np.ones_like(ids_BT), mask_BT)
    rows_B = np.arange(B, dtype=np.int32)
    batch = sharding.put_batch(Batch(tokens, tokens, rows_B=rows_B), mesh)
    jax.block_until_ready((state, models, batch))
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts again.
    between = resident('VmRSS') - before
    for _ in range(steps):
      state, metrics = planned.compiled(state, models, batch)
      loss = float(metrics['loss'])
  peak = resident('VmHWM') - before
  return {
    'plan_gb': planned.peak / 1e9,
    'peak_gb': peak / 1e9,
    'ratio': planned.peak / peak,
    'between_steps_gb': between / 1e9,
    'loss': loss,
  }


def resident(name):
  """Bytes of this process: VmRSS now, VmHWM at most."""
  status = Path('/proc/self/status').read_text()
  return 1024 * int(re.search(rf'{name}:\s+(\d+) kB', status)[1])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--case', choices=CASES, help='this one only, here')
  parser.add_argument('--folder', help='for models and compiled steps')
  args = parser.parse_args()
  if args.case:
    print(json.dumps(measure(args.case, args.folder)))
    return
  with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      # What is freed is given back, and not counted.
      'MALLOC_MMAP_THRESHOLD_': '65536',
      'JAX_COMPILATION_CACHE_DIR': f'{folder}/compiled',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    found = {}
    for case in CASES:
      command = [sys.executable, '-m', 'tools.bench.plan', f'--case={case}']
      command.append(f'--folder={folder}')
      for _ in range(2):  # The first compiles.
        done = subprocess.run(
          command, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
          sys.exit(f'{case}: {done.stderr}')
      found[case] = json.loads(done.stdout.splitlines()[-1])
      print(case, found[case], file=sys.stderr, flush=True)
  print(json.dumps({'cases': found}))


if __name__ == '__main__':
  main()
