"""Two processes that share a model: each reads its part, one writes all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy

_PROCESS = """
import sys
from pathlib import Path

import jax

process, port, source, out = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{port}', 2, int(process))

from gakd_jax import models, sharding
from gakd_jax.models import convert

copied = 0
copy = convert._copy

def counted(out, x):
  global copied
  copied += out.nbytes
  copy(out, x)

convert._copy = counted
mesh = sharding.make_mesh(data=1, fsdp=4)
model = models.load(source, mesh=mesh)
read = copied
models.save(model, out)
print('read', read, flush=True)
"""


@pytest.mark.slow
def test_each_reads_its_part_and_one_writes_all(
  tiny_model_dir, tmp_path, free_port
):
  source, out = tiny_model_dir(), tmp_path / 'out'
  running = [
    subprocess.Popen(
      [sys.executable, '-c', _PROCESS, str(i), str(free_port), source, out],
      stdout=subprocess.PIPE,
      text=True,
      cwd=Path(__file__).parents[2],
    )
    for i in range(2)
  ]
  said = [p.communicate(timeout=120)[0] for p in running]
  assert [p.returncode for p in running] == [0, 0]
  read = [int(re.search(r'^read (\d+)$', text, re.M)[1]) for text in said]
  before, after = (
    safetensors.numpy.load_file(path / 'model.safetensors')
    for path in (source, out)
  )
  assert before.keys() == after.keys()
  for name, x in before.items():
    assert x.tobytes() == after[name].tobytes(), name
  size = sum(x.nbytes for x in before.values())
  # Half of what is split; norms are small, and everybody's.
  assert 0.5 * size <= max(read) < 0.55 * size
  assert (out / 'tokenizer.json').exists()
