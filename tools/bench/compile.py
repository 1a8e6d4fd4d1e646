"""What it takes to trace, lower and compile a train step of full size.

  python -m tools.bench.compile

Qwen3-8B teaches Qwen3-0.6B as configs/gakd.py has it, but without adapters:
all weights of the student are trained, in bf16. There are shapes and no
weights. `trace` is Python and JAX up to the jaxpr, `lower` to StableHLO,
`compile` XLA for this CPU, with an empty cache; `before` is all of a run that
comes first: reading both config.json, abstract models, optimizers. `deep` has
twice the layers: what is scanned costs no more. Sizes are of the programs:
lines of StableHLO, and instructions of what was compiled.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.bench import side_by_side

_QWEN3 = {
  'model_type': 'qwen3',
  'vocab_size': 151936,
  'head_dim': 128,
  'num_key_value_heads': 8,
  'max_position_embeddings': 40960,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1000000,
  'hidden_act': 'silu',
}
STUDENT = {
  'hidden_size': 1024,
  'intermediate_size': 3072,
  'num_hidden_layers': 28,
  'num_attention_heads': 16,
  'tie_word_embeddings': True,
}
TEACHER = {
  'hidden_size': 4096,
  'intermediate_size': 12288,
  'num_hidden_layers': 36,
  'num_attention_heads': 32,
  'tie_word_embeddings': False,
}
# {name: (method of configs/gakd.py, times as many layers)}
CASES = {
  'sft': ('sft', 1),
  'rkl': ('rkl', 1),
  'rgan': ('rgan', 1),
  'rgan, deep': ('rgan', 2),
}


def config_of(method, folder, times=1):
  """The config of a method for models that are a config.json each."""
  from configs import gakd

  def model(name, shape):
    path = Path(folder) / name
    path.mkdir(exist_ok=True)
    layers = times * shape['num_hidden_layers']
    hf = _QWEN3 | shape | {'num_hidden_layers': layers}
    (path / 'config.json').write_text(json.dumps(hf))
    return str(path)

  c = gakd.get_config(f'{method},0p6b')
  c.student.path = model('student', STUDENT)
  c.student.lora = None
  c.teacher.path = None
  if method != 'sft':
    c.teacher.path = model('teacher', TEACHER)
  c.train.steps, c.train.epochs = 1000, None
  return c


def measure(case):
  import jax

  from gakd_jax import build, plan, sharding, training

  method, times = CASES[case]
  marks = [time.perf_counter()]
  with tempfile.TemporaryDirectory() as folder:
    config = config_of(method, folder, times)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
      run = build.abstract(config, mesh)
      made = training.make(run, 0, config.train.steps)
      batch = plan.shapes_of_batch(config, mesh, run.writer)
      marks.append(time.perf_counter())
      traced = made.step.trace(made.state, run.models, batch)
      marks.append(time.perf_counter())
      lowered = traced.lower()
      marks.append(time.perf_counter())
      compiled = lowered.compile()
      marks.append(time.perf_counter())
  program = compiled.as_text().splitlines()
  names = 'before', 'trace', 'lower', 'compile'
  seconds = zip(names, marks[:-1], marks[1:], strict=True)
  return {name: after - before for name, before, after in seconds} | {
    'all': marks[-1] - marks[0],
    'lines of StableHLO': len(lowered.as_text().splitlines()),
    'instructions': sum(' = ' in line for line in program),
    'loops': sum(' while(' in line for line in program),
    'peak_gb': side_by_side.peak_gb(),
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', choices=CASES, help='measure this one, here')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  if args.case:
    print(json.dumps(measure(args.case)))
    return
  found = {case: [] for case in CASES}
  for i in range(args.rounds):
    for case in list(CASES)[:: 1 if i % 2 == 0 else -1]:
      command = [sys.executable, '-m', 'tools.bench.compile', f'--case={case}']
      done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
      if done.returncode:
        sys.exit(f'{case}: failed')
      found[case].append(json.loads(done.stdout.splitlines()[-1]))
      print(case, found[case][-1], file=sys.stderr, flush=True)
  sizes = 'lines of StableHLO', 'instructions', 'loops'
  print(
    json.dumps(
      {
        'seconds': {
          case: {
            key: side_by_side.spread(x[key] for x in measured)
            for key in measured[0]
            if key not in sizes
          }
          for case, measured in found.items()
        },
        'sizes': {
          case: {key: measured[0][key] for key in sizes}
          for case, measured in found.items()
        },
      }
    )
  )


if __name__ == '__main__':
  main()
