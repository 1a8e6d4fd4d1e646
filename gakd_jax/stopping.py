"""Requests to stop, SIGINT and SIGTERM, as all processes of a run learn them.

They are listened to while a run trains, which then saves and ends. A second
one, at least a second later, ends the process at once.
"""

import contextlib
import os
import signal
import sys
import time

import jax

from gakd_jax import hosts

STATUS = 130  # of a process that was asked to stop
_APART_S = 1  # A launcher and a terminal may pass on the same one.
_POLL_S = 1e-3
_requests = None  # None: nobody listens, and a signal does what it does.


class Stopped(Exception):
  """Somebody asked to stop: raised in all processes at the same place."""


@contextlib.contextmanager
def listening():
  """Within it, `requested`, `check` and `fetch` know of requests."""
  global _requests
  _requests = _Requests()
  signals = (signal.SIGINT, signal.SIGTERM)
  previous = {n: signal.signal(n, _requests.handle) for n in signals}
  try:
    yield
  finally:
    _requests = None
    for number, handler in previous.items():
      signal.signal(number, handler)


def requested():
  """Whether any process was asked to stop; all call it alike."""
  return _requests is not None and _requests.agreed()


def check():
  """Raises `Stopped` if `requested`."""
  if requested():
    raise Stopped


def wait(tree):
  """Until the arrays are there, or a request to stop raises `Stopped`.

  All processes call it alike. One that is alone leaves what its device is
  computing; of several, each waits for it, as the others' answers come by way
  of the devices.
  """
  check()
  if _requests is not None and jax.process_count() == 1:
    for x in jax.tree.leaves(tree):
      while isinstance(x, jax.Array) and not x.is_ready():
        time.sleep(_POLL_S)
        check()


def fetch(tree):
  """`jax.device_get`, after `wait`."""
  wait(tree)
  return jax.device_get(tree)


def leave():
  """Ends the process, whatever its device is still computing."""
  if jax.process_count() > 1:  # Nothing: all have come to the same place.
    sys.exit(STATUS)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(STATUS)


class _Requests:
  def __init__(self):
    self._first = None  # time of the first
    self._any_of = hosts.AnyOf()
    self._agreed = False

  def handle(self, number, frame):
    del number, frame
    now = time.monotonic()
    if self._first is None:
      self._first = now
    elif now - self._first >= _APART_S:
      print('stopped at once; the last checkpoint counts', file=sys.stderr)
      os._exit(STATUS)

  def agreed(self):
    self._agreed = self._agreed or self._any_of(self._first is not None)
    return self._agreed
