"""Requests to stop: heard at once, and what a second one does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from gakd_jax import stopping

ROOT = Path(__file__).parents[1]


def ask():
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_it_is_heard_where_it_is_asked_for(number):
  before = signal.getsignal(number)
  with stopping.listening():
    stopping.check()
    assert stopping.fetch({'x': jnp.ones(2), 'y': 3})['x'].tolist() == [1, 1]
    os.kill(os.getpid(), number)
    assert stopping.requested()
    with pytest.raises(stopping.Stopped):
      stopping.fetch(jnp.ones(2))
    with pytest.raises(stopping.Stopped):
      stopping.check()
  assert signal.getsignal(number) == before
  stopping.check()  # Nobody listens.
  with stopping.listening():  # Of another run, nothing was asked.
    assert not stopping.requested()


def test_the_same_request_by_two_ways_is_one():
  with stopping.listening():
    ask()
    ask()
    assert stopping.requested()


SCRIPT = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp
from gakd_jax import Interrupted, binary, stopping

def long(x):  # Minutes.
  return jax.lax.while_loop(
    lambda s: s[0] < 10**6, lambda s: (s[0] + 1, jnp.tanh(s[1] @ s[1])), (0, x)
  )

x = jnp.ones((300, 300))
long = jax.jit(long).lower(x).compile()

def ask():
  time.sleep(0.3)
  os.kill(os.getpid(), signal.SIGTERM)

def main(argv):
  with stopping.listening():
    threading.Thread(target=ask, daemon=True).start()
    if argv[1] == 'twice':
      while not stopping.requested():
        time.sleep(0.01)
      time.sleep(1.1)
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(600)
    try:
      stopping.fetch(long(x))
    except stopping.Stopped:
      raise Interrupted('saved') from None

from absl import flags
binary.guarded(main, [sys.argv[0], sys.argv[1]])
"""


@pytest.mark.parametrize(
  ('how', 'said'), [('once', 'saved\n'), ('twice', 'stopped at once')]
)
def test_nobody_waits_for_the_device(how, said):
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, how],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
    timeout=60,
  )
  assert done.returncode == stopping.STATUS, done.stderr
  assert said in done.stderr
