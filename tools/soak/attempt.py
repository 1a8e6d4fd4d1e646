"""One attempt at a run, in a process of its own, and what happens to it."""

import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from gakd_jax import binary, main

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_CHANGES = (
  *('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate'),
  'shutil.rmtree',
)


class Attempt:
  """A process that runs gakd_jax.main.

  Forked from this one, which has imported all and not begun with JAX: that
  saves the seconds of starting Python.

  Args:
    config, workdir: flags of gakd_jax.main.
    log: file of what it prints.
    kill_at: it kills itself before it changes a file of its directory for the
      so manieth time; None: not.
    clock: seconds that its clock is off.
  """

  def __init__(self, config, workdir, log, kill_at=None, clock=0.0):
    self.log, self.began = Path(log), time.monotonic()
    sys.stdout.flush()
    self.pid = os.fork()
    if self.pid == 0:
      try:
        self._run(config, Path(workdir), kill_at, clock)
      finally:
        os._exit(99)  # Not reached, but for a bug of ours.

  def _run(self, config, workdir, kill_at, clock):
    out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    changes = _count_changes(workdir, kill_at)
    real = time.time
    time.time = lambda: real() + clock
    status = 0
    argv = ['main', f'--config={config}', f'--workdir={workdir}']
    try:
      binary.guarded(main._main, argv)
    except SystemExit as e:
      status = e.code
    except BaseException:
      traceback.print_exc()
      status = 1
    print(f'changes {changes[0]}')
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

  def is_alive(self):
    return self.status is None

  @property
  def status(self):
    """Exit status, -signal if it was killed; None while it runs."""
    if not hasattr(self, '_status'):
      pid, status = os.waitpid(self.pid, os.WNOHANG)
      if pid == 0:
        return None
      self._status = os.waitstatus_to_exitcode(status)
    return self._status

  def wait(self, seconds=600):
    """Its exit status; it is killed if it has none by then."""
    end = time.monotonic() + seconds
    while self.is_alive():
      if time.monotonic() > end:
        self.send(signal.SIGKILL)
        raise TimeoutError(f'{self.log}: still runs after {seconds} s')
      time.sleep(0.002)
    return self.status

  def send(self, number):
    os.kill(self.pid, number)

  def text(self):
    return self.log.read_text(errors='replace') if self.log.exists() else ''


def _count_changes(workdir, kill_at):
  """[how many changes of files there were], while it counts on."""
  counted = [0]
  root = str(workdir)

  def hook(event, args):
    if event == 'open':
      path, _, flags = args
      if not isinstance(flags, int) or not flags & _WRITES:
        return
    elif event in _CHANGES:
      path = args[0]
    else:
      return
    if isinstance(path, int) or not os.fsdecode(path).startswith(root):
      return
    counted[0] += 1
    if counted[0] == kill_at:
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)
  return counted


def damage(directory, random):
  """Hurts one file of a directory: what was done."""
  files = sorted(path for path in directory.rglob('*') if path.is_file())
  path = random.choice(files)
  data = bytearray(path.read_bytes())
  how = random.choice(('truncate', 'flip', 'empty', 'remove', 'zero'))
  if how == 'remove':
    path.unlink()
    return how
  if how == 'flip':
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
  elif how == 'zero':  # A block that never reached the disk.
    begin = random.randrange(len(data))
    n = len(data[begin : begin + 4096])
    data[begin : begin + n] = bytes(n)
    if bytes(data) == path.read_bytes():
      data[begin] = 1
  elif how == 'truncate':
    data = data[: len(data) // 2]
  else:
    data = b''
  path.write_bytes(data)
  return how


def fill(directory, leave):
  """Fills up a file system but for so many bytes: a file to remove."""
  path = directory.parent / 'filler'
  free = shutil.disk_usage(directory).free
  with path.open('wb') as file:
    file.write(bytes(max(0, free - leave)))
  return path
