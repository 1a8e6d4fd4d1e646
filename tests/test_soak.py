"""A short soak: the long ones are run by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_nothing_is_lost():
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'tools.soak', '--faults=10', '--seed=1'),
      '--kinds=gakd,on_policy',
    ],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  summary = json.loads(done.stdout[done.stdout.index('{\n') :])
  assert summary['runs'] >= 1
  assert summary['lost'] is None
