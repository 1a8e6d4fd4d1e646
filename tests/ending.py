"""Runs that are stopped or killed at a step."""

import contextlib
import os
import signal

from gakd_jax import loop


class Killed(Exception):
  pass


def stop():
  """What Ctrl-C does."""
  os.kill(os.getpid(), signal.SIGINT)


def kill():
  """Nothing is saved any more."""
  raise Killed


@contextlib.contextmanager
def at(step, end, monkeypatch):
  """Meanwhile `end()` is called where a run logs that step."""

  class Log(loop._Log):
    def step(self, now, *found):
      super().step(now, *found)
      if now == step:
        end()

  with monkeypatch.context() as patch:
    patch.setattr(loop, '_Log', Log)
    yield
