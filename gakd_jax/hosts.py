"""Several processes, on one host or many, that are one run.

Each runs the same program. They find each other (`start`), and what only one
of them can know, whether a file is there or a signal came, all learn before
anyone acts on it: `of_first`, `check_same`, `AnyOf`. An error of one ends all.
"""

import contextlib
import importlib.util
import os
import pickle
import re
import sys
import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError, rollcall

# The first writes what all wait for: a report, a model, an archive of data.
_LONGEST_WAIT_S = 24 * 3600
_roll_call = None


def start(
  coordinator=None,
  processes=None,
  process_id=None,
  start_timeout=300,
  heartbeat_timeout=60,
):
  """Joins the processes of the run; nothing where this one is alone.

  To be called before anything asks JAX for its devices. Without arguments they
  are looked for where a launcher left word of them: SLURM, Open MPI or another
  MPI, TPU VMs, Kubernetes. Only the first speaks from here on; errors are
  everybody's.

  Args:
    coordinator: host:port of the first process; the port after it is used too.
    processes, process_id: how many, and which of them this is.
    start_timeout: seconds to wait for all.
    heartbeat_timeout: seconds after which a host that is silent is dead, and
      the others end.

  Raises:
    UserError: naming who did not come in time.
  """
  global _roll_call
  given = (coordinator, processes, process_id)
  is_slurms = given == (None, None, None)
  if is_slurms:
    given = of_slurm(os.environ)
  elif None in given:
    raise UserError(
      '--coordinator, --processes and --process_id: give all three, or none'
    )
  method = None
  if given is None:
    method = _found_by_jax()
    if method is None:
      return
    given = (None, None, None)
  elif given[1] == 1:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', False)  # We have `AnyOf`.
  address, processes, process_id = given
  settings = {}
  if address is not None:
    host, port = _address(address)
    if not 0 <= process_id < processes:
      raise UserError(
        f'--process_id={process_id} of --processes={processes}: expected 0 to '
        f'{processes - 1}'
      )
    _roll_call = rollcall.RollCall(
      (host, port + 1), processes, process_id, start_timeout, heartbeat_timeout
    )
    settings = {'cluster_detection_method': 'deactivate'}
    # Else whoever gave the address deals the devices.
    has_id = is_slurms and 'SLURM_LOCALID' in os.environ
    if has_id and not _has_host_alone():
      settings['local_device_ids'] = [int(os.environ['SLURM_LOCALID'])]
  elif method != 'any':
    settings = {'cluster_detection_method': method}
  with _time_limit(start_timeout):
    jax.distributed.initialize(
      address,
      processes,
      process_id,
      initialization_timeout=int(start_timeout) + 60,
      heartbeat_timeout_seconds=int(heartbeat_timeout),
      shutdown_timeout_seconds=_LONGEST_WAIT_S,
      **settings,
    )
  if jax.process_index() != 0:
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


def finish():
  """This process ends well, and leaves the others to do so."""
  if _roll_call:
    _roll_call.bye()


def fail(code, error):
  """Ends this process and all others, of several; alone, does nothing.

  Nobody can wait for the others here: they wait for us, in a collective.
  """
  if _roll_call is None and not jax.distributed.is_initialized():
    return
  if _roll_call:
    _roll_call.tell(code, error)
  rollcall.leave(code, error)


def fail_by_bug(error):
  """`fail`, with a traceback: of a bug, or of another process's end."""
  if _roll_call:
    time.sleep(3)  # Of the other's end, its own words come meanwhile.
  if jax.distributed.is_initialized():
    traceback.print_exception(error)
  fail(1, f'{type(error).__name__}: {str(error).partition(chr(10))[0]}')


def of_first(make):
  """What `make()` is on the first process, which alone calls it."""
  if jax.process_count() == 1:
    return make()
  is_first = jax.process_index() == 0
  data = pickle.dumps(make()) if is_first else b''
  n = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  sent = np.zeros(-(-n // 4096) * 4096, np.uint8)  # Few sizes to compile for.
  sent[: len(data)] = np.frombuffer(data, np.uint8)
  return pickle.loads(multihost_utils.broadcast_one_to_all(sent).tobytes()[:n])


def only_first(do):
  """The first process calls `do()`, and all go on when it is done."""
  of_first(lambda: do() and None)


def all_of(is_so):
  """Whether it is so on every process."""
  if jax.process_count() == 1:
    return is_so
  return bool(multihost_utils.process_allgather(np.array(is_so)).all())


def check_same(values):
  """Refuses {what: value} that differ between processes."""
  theirs = of_first(lambda: values)
  for what in sorted(theirs.keys() | values.keys()):
    if theirs.get(what) != values.get(what):
      raise UserError(
        f'{what} is {values.get(what)!r}, and on the first host '
        f'{theirs.get(what)!r}; all must have the same files and packages'
      )


class AnyOf:
  """Whether any process has asked for something, as all know alike.

  What is asked at one call all know at the next one: the answer is on its way
  as a step is computed, and nobody waits for it longer than for that step.
  """

  def __init__(self):
    self._late = None
    if jax.process_count() > 1:
      mesh = Mesh(np.array(jax.devices()), ('device',))
      self._place = NamedSharding(mesh, P('device'))
      self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))

  def __call__(self, asked):
    if jax.process_count() == 1:
      return asked
    late, self._late = (
      self._late,
      self._any(
        jax.make_array_from_callback(
          (jax.device_count(),), self._place, lambda _: np.array([asked])
        )
      ),
    )
    return late is not None and bool(late)


@contextlib.contextmanager
def _time_limit(seconds):
  """Says so when JAX does not find the others; it would end by abort()."""
  error = f'not all processes have come within {seconds:g} s (--start_timeout)'
  timer = threading.Timer(seconds, rollcall.leave, [2, error])
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _address(text):
  host, _, port = text.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65535:
    raise UserError(
      f'--coordinator={text!r}: expected <host>:<port>, a port below 65535'
    )
  return host.strip('[]'), int(port)


def of_slurm(env):
  """(address, processes, process_id) that SLURM tells a step; None: nothing.

  A port that follows from the job and step, below those that systems give to
  outgoing connections.
  """
  numbers = [
    env.get(f'SLURM_{name}')
    for name in ('JOB_ID', 'STEP_ID', 'PROCID', 'STEP_NUM_TASKS')
  ]
  hosts = env.get('SLURM_STEP_NODELIST')
  if None in (*numbers, hosts):
    return None
  job, step, process, processes = map(int, numbers)
  # 'n1', 'n1,n2', 'n[01-04,7]-ib,m3': the first of them.
  first = re.match(r'([^,\[]*)(?:\[(\w+)[^]]*\]([^,\[]*))?', hosts)
  host = ''.join(part or '' for part in first.groups())
  port = 10_000 + 2 * ((31 * job + step) % 10_000)
  return f'{host}:{port}', processes, process


def _has_host_alone():
  """Whether a task of SLURM shares its host with no other: all GPUs are its."""
  tasks = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '')
  return re.fullmatch(r'1(\(x\d+\))?', tasks) is not None


def _found_by_jax():
  """How JAX finds the others here, 'any' or a method's name; None: nobody."""
  env = os.environ
  if jax.config.jax_platforms != 'cpu' and importlib.util.find_spec('libtpu'):
    # JAX sets this one where it sees no chips; GKE sets both.
    on_vm = 'TPU_SKIP_MDS_QUERY' not in env
    if on_vm or ',' in env.get('TPU_WORKER_HOSTNAMES', ''):
      return 'any'
  ranks = ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'PMIX_SIZE')
  if any(int(env.get(name, 1)) > 1 for name in ranks):
    if 'OMPI_MCA_orte_hnp_uri' in env:
      return 'ompi'
    if importlib.util.find_spec('mpi4py'):
      return 'mpi4py'
    raise UserError(
      'started by MPI, whose other processes are found through mpi4py: pip '
      'install mpi4py, or give --coordinator, --processes and --process_id'
    )
  if 'KUBERNETES_SERVICE_HOST' in env and 'JOB_COMPLETION_INDEX' in env:
    return 'any' if importlib.util.find_spec('kubernetes') else None
  return None
