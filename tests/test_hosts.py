"""Several processes that are one run, as a launcher starts them."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gakd_jax import UserError, hosts, log, rollcall, rundir

ROOT = Path(__file__).parents[1]
STEPS = 30
TOLERANCE = 1e-5
WORDS = ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
_CONFIG = """
from configs import base


def get_config():
  c = base.get_config()
  c.student.path, c.teacher.path = {models!r}
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.data.train = c.data.validation = {data!r}
  c.data.template = 'chat'
  c.data.max_length, c.data.max_prompt_length = 48, 32
  c.data.buckets = (48,)
  c.objective = {{'name': 'gakd', 'kind': 'rgan', 'warmup_steps': 2}}
  c.critic.width, c.critic.layers, c.critic.ff_width = 16, 1, 32
  c.critic.heads = 2
  c.optimizer.learning_rate = 3e-3
  c.train.batch_size, c.train.steps, c.train.head_chunk = 8, {steps}, 16
  c.mesh.data, c.mesh.fsdp = 2, 2
  c.evals = {{'loss': {{'batch_size': 8, 'limit': 8}}}}
  c.eval_every = c.checkpoint.every = 0
  c.report.trackers = ()
  return c
"""


@pytest.fixture(scope='module')
def config_file(tiny_model_dir, tmp_path_factory):
  folder = tmp_path_factory.mktemp('config')
  rows = [
    {'instruction': f'Repeat {word}.', 'input': '', 'output': word}
    for word in WORDS * 3
  ]
  data = folder / 'rows.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  models = str(tiny_model_dir(seed=0)), str(tiny_model_dir(seed=1, width=48))
  path = folder / 'config.py'
  path.write_text(_CONFIG.format(models=models, data=str(data), steps=STEPS))
  return path


@pytest.fixture
def begin(free_port):
  """`begin(arguments, processes=2)`: starts them, or some, of `which`."""
  started = []

  def do(arguments, processes=2, which=None, devices=2, program='main', **env):
    which = range(processes) if which is None else which
    for i in which:
      several = [
        f'--coordinator=localhost:{free_port}',
        f'--processes={processes}',
        f'--process_id={i}',
        '--start_timeout=60',
        '--heartbeat_timeout=10',
      ]
      started.append(
        subprocess.Popen(
          [sys.executable, '-m', f'gakd_jax.{program}', *arguments]
          + (several if processes > 1 else []),
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
          cwd=ROOT,
          env=os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)} | env,
        )
      )
    return started[-len(which) :]

  yield do
  for process in started:
    process.kill()
    process.communicate()


def end(running, *codes):
  """What they have said on their ways out, which are these."""
  said = [p.communicate(timeout=120) for p in running]
  found = [p.returncode for p in running]
  assert found == list(codes), '\n'.join(err[-3000:] for _, err in said)
  return said


def losses(workdir):
  return {
    row['step']: (row['train/loss'], row['train/critic/loss'])
    for row in log.read_metrics(workdir)
    if 'train/loss' in row
  }


def of(config_file, workdir, *more):
  return [f'--config={config_file}', f'--workdir={workdir}', *more]


@pytest.fixture(scope='module')
def whole(config_file, tmp_path_factory):
  """The losses of a run in one process that nothing interrupts."""
  workdir = tmp_path_factory.mktemp('whole')
  env = os.environ | {'JAX_NUM_CPU_DEVICES': '4'}
  command = [sys.executable, '-m', 'gakd_jax.main', *of(config_file, workdir)]
  subprocess.run(command, cwd=ROOT, env=env, check=True)
  assert list(losses(workdir)) == list(range(1, STEPS + 1))
  return losses(workdir)


def when_at(step, running, workdir):
  """Waits until a step is logged."""
  while max(losses(workdir), default=0) < step:
    assert all(p.poll() is None for p in running), running[0].communicate()
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['2,2,1', '1,1,4'])
def test_two_processes_train_as_one_does(
  config_file, whole, begin, tmp_path, mesh
):
  """Also where `tensor` crosses them, and both read all rows."""
  sizes = zip(('data', 'fsdp', 'tensor'), mesh.split(','), strict=True)
  flags = [f'--config.mesh.{name}={n}' for name, n in sizes]
  end(begin(of(config_file, tmp_path, *flags)), 0, 0)
  found = losses(tmp_path)
  np.testing.assert_allclose(
    [*found.values()], [*whole.values()], rtol=TOLERANCE
  )


@pytest.mark.slow
@pytest.mark.parametrize('shared', [True, False])
def test_a_teacher_is_kept_on_each_host_or_once_for_all(
  config_file, whole, begin, tmp_path, shared
):
  """Also where one has lost its part."""
  roots = ['one', 'one'] if shared else ['one', 'two']
  flags = of(config_file, tmp_path / 'run', '--config.teacher.cache=hidden')
  for round_ in range(2):
    if round_:
      (file,) = (tmp_path / roots[1]).rglob('hidden.bin')
      file.write_bytes(b'x' + file.read_bytes()[1:])
      shutil.rmtree(tmp_path / 'run')
    running = [
      begin(flags, which=[i], GAKD_JAX_CACHE=str(tmp_path / root))[0]
      for i, root in enumerate(roots)
    ]
    end(running, 0, 0)
    np.testing.assert_allclose(
      [*losses(tmp_path / 'run').values()], [*whole.values()], rtol=TOLERANCE
    )
  for root in roots:
    assert len([*(tmp_path / root).rglob('hidden.bin')]) == 1


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_others_go_on(
  config_file, whole, begin, tmp_path
):
  """Two are stopped, one goes on, is stopped, and two finish the run."""
  step = 0
  for processes, which in ((2, 1), (1, 0)):
    running = begin(
      of(config_file, tmp_path), processes, devices=4 // processes
    )
    when_at(step + 3, running, tmp_path)
    running[which].send_signal(signal.SIGTERM)
    said = end(running, *[130] * processes)
    steps = {re.search(r'saved at step (\d+)', err)[1] for _, err in said}
    assert len(steps) == 1
    (step,) = map(int, steps)
    assert max(losses(tmp_path)) == step < STEPS
  (out, _), (silent, _) = end(begin(of(config_file, tmp_path)), 0, 0)
  assert f'continuing from step {step}' in out
  # What is not ours is printed where Python does not see it.
  # Several threads write it, one into the other's line.
  assert not re.sub(r'^.*(\[Gloo\]|peer ranks).*\n', '', silent, flags=re.M)
  found = losses(tmp_path)
  assert list(found) == list(whole)
  np.testing.assert_allclose(
    [*found.values()], [*whole.values()], rtol=TOLERANCE
  )
  assert rundir.is_finished(tmp_path)


@pytest.mark.slow
def test_all_leave_an_evaluation_at_the_same_batch(
  config_file, begin, tmp_path
):
  """And do it again, all of it."""
  sampled = (
    "{'kind': 'generation', 'max_new_tokens': 4, 'limit': 8, 'batch_size': 4,"
    f" 'seeds': {tuple(range(60))}}}"
  )
  flags = of(
    *(config_file, tmp_path, '--config.train.steps=4'),
    f"--config.evals={{'sampled': {sampled}}}",
  )
  running = begin(flags)
  when_at(4, running, tmp_path)
  running[1].send_signal(signal.SIGTERM)
  for _, err in end(running, 130, 130):
    assert 'saved at step 4 of 4' in err
  assert not (tmp_path / 'answers').exists()
  assert [row for row in log.read_metrics(tmp_path) if len(row) < 5] == []
  end(begin(flags), 0, 0)
  assert len([*(tmp_path / 'answers').iterdir()]) == 60


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'victim'),
  [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)],
)
def test_when_one_dies_or_hangs_the_other_ends(
  config_file, begin, tmp_path, number, victim
):
  running = begin(of(config_file, tmp_path, '--config.train.steps=10000'))
  when_at(3, running, tmp_path)
  other = running[1 - victim]
  running[victim].send_signal(number)
  _, err = other.communicate(timeout=10 + 20)  # The limit, and a busy machine.
  if number == signal.SIGKILL:
    assert other.returncode == 1
    assert f'error: process {victim} on' in err
    assert 'has died' in err
  else:
    assert other.returncode != 0


@pytest.mark.slow
def test_rollouts_are_shared(config_file, begin, tmp_path):
  rollout = "{'writer': 'student', 'max_new_tokens': 8, 'every': 2}"
  flags = [f'--config.rollout={rollout}', '--config.train.steps=4']
  flags += ['--config.data.max_length=56']
  two, one = tmp_path / 'two', tmp_path / 'one'
  end(begin(of(config_file, two, *flags)), 0, 0)
  end(begin(of(config_file, one, *flags), 1, devices=4), 0)
  np.testing.assert_allclose(
    [*losses(two).values()], [*losses(one).values()], rtol=TOLERANCE
  )
  assert rundir.read_rollouts(two) == rundir.read_rollouts(one) != []


@pytest.mark.slow
def test_answers_are_shared(config_file, tiny_model_dir, begin, tmp_path):
  flags = [
    f'--model={tiny_model_dir(seed=0)}',
    f'--dataset={config_file.parent / "rows.jsonl"}',
    '--max_new_tokens=8',
    '--batch_size=4',
    '--keep_unfinished',
  ]
  two, one = tmp_path / 'two.jsonl', tmp_path / 'one.jsonl'
  end(begin([*flags, f'--output={two}'], program='generate'), 0, 0)
  end(begin([*flags, f'--output={one}'], 1, program='generate'), 0)
  assert two.read_text() == one.read_text()
  again = begin([*flags, f'--output={two}'], program='generate')
  for _, err in end(again, 2, 2):
    assert 'it exists; name another file' in err


@pytest.mark.slow
def test_an_error_of_one_ends_all(config_file, begin, tmp_path):
  first = begin(of(config_file, tmp_path), which=[0])
  flags = of(config_file, tmp_path, '--config.seed=1')
  said = end([*first, *begin(flags, which=[1])], 2, 2)
  for _, err in said:
    assert err.count('error:') == 1
    assert 'config.seed is 1, and on the first host 0' in err
  assert 'error: process 1: ' in said[0][1]


FAILS = """
import errno, sys
if '--process_id=1' in sys.orig_argv:
  from gakd_jax.data import pipeline

  collate, calls = pipeline.collate, []

  def fails(*args, **settings):
    calls.append(1)
    if len(calls) > 20:
      raise OSError(errno.EIO, 'Input/output error', '/data/rows.bin')
    return collate(*args, **settings)

  pipeline.collate = fails
"""


@pytest.mark.slow
def test_an_error_after_a_save_ends_all(config_file, begin, tmp_path):
  (tmp_path / 'sitecustomize.py').write_text(FAILS)
  flags = of(config_file, tmp_path / 'run', '--config.checkpoint.every=4')
  path = os.pathsep.join(map(str, (tmp_path, ROOT)))
  said = end(begin(flags, PYTHONPATH=path), 2, 2)
  for _, err in said:
    assert err.count('error:') == 1
    assert '/data/rows.bin: Input/output error' in err


@pytest.mark.slow
def test_skipped_steps_end_all_at_the_same_one(config_file, begin, tmp_path):
  flags = ['critic_optimizer.learning_rate=1e30', 'train.max_skipped=3']
  flags = of(config_file, tmp_path, *(f'--config.{x}' for x in flags))
  said = end(begin(flags), 2, 2)
  ends = {re.search(r'steps \d+ to \d+ were all', err)[0] for _, err in said}
  assert len(ends) == 1
  assert not any('Traceback' in err for _, err in said)
  assert 'was skipped' in said[0][0]
  assert len([*(tmp_path / 'checkpoints').iterdir()]) == 1


@pytest.mark.slow
def test_a_disk_that_one_cannot_write_to_ends_all(config_file, begin, tmp_path):
  flags = of(config_file, tmp_path / 'run')
  first = begin(flags, which=[0])
  second = begin(flags, which=[1], GAKD_JAX_CACHE='/dev/null/cache')
  for _, err in end([*first, *second], 2, 2):
    assert '/dev/null/cache/data: cannot write there (Not a directory)' in err
    assert 'Traceback' not in err


def call(port, processes, process_id, timeout=60):
  """`rollcall.RollCall`, or its error."""
  try:
    return rollcall.RollCall(
      ('localhost', port), processes, process_id, timeout, 60
    )
  except UserError as error:
    return str(error)


def calls(port, processes, *waits):
  """What `call` gives to each of some (process_id, timeout)."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = [pool.submit(call, port, processes, *wait) for wait in waits]
    return [x.result() for x in found]


def test_who_does_not_come_is_named(free_port):
  for error in calls(free_port, 4, (0, 1), (2, 60)):
    assert 'process 1, 3 of 4 did not come to localhost:' in error
    assert 'within 1 s (--start_timeout)' in error
  assert 'process 0 of 4 did not come' in call(free_port, 4, 2, timeout=0.5)


def test_two_that_are_called_alike_are_refused(free_port):
  errors = {*calls(free_port, 3, (0, 60), (1, 60), (1, 60))}
  (error,) = errors
  assert 'has come as process 1, which is there already of 3' in error


def test_a_strangers_port_is_said(free_port):
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for said in (b'SSH-2.0-x\n', b'[]\n', b'\xff\n'):
      with socket.create_server(('localhost', free_port)) as server:
        second = pool.submit(call, free_port, 2, 1)
        connection, _ = server.accept()
        with connection:
          connection.sendall(said)
          assert "of localhost is somebody else's" in second.result()


@pytest.mark.slow
def test_strangers_are_not_listened_to(free_port):
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(call, free_port, 2, 0, timeout=3)
    for said in (b'GET / HTTP/1.1\n', b'[]\n', b'{}\n', b''):
      with connected(free_port) as stranger:
        stranger.sendall(said)
    assert 'process 1 of 2 did not come' in first.result()


def connected(port):
  for _ in range(300):
    with contextlib.suppress(OSError):
      return socket.create_connection(('localhost', port))
    time.sleep(0.01)
  raise TimeoutError('nobody listens')


SLURM = {
  'SLURM_JOB_ID': '1234567',
  'SLURM_STEP_ID': '0',
  'SLURM_PROCID': '3',
  'SLURM_STEP_NUM_TASKS': '16',
  'SLURM_STEP_NODELIST': 'node[007-008,12]',
}


@pytest.mark.parametrize(
  ('nodes', 'first'),
  [
    ('node1', 'node1'),
    ('node1,other[3-4]', 'node1'),
    ('node[007-008,12]', 'node007'),
    ('gpu-a[3,5]-ib,b1', 'gpu-a3-ib'),
  ],
)
def test_slurm_says_who_is_there(monkeypatch, nodes, first):
  assert hosts.of_slurm({}) is None
  assert hosts.of_slurm(SLURM | {'SLURM_STEP_NODELIST': nodes}) == (
    f'{first}:{10_000 + 2 * (31 * 1234567 % 10_000)}',
    16,
    3,
  )


@pytest.mark.parametrize('is_told', [False, True])
def test_devices_are_slurms_to_deal_where_it_named_the_hosts(
  monkeypatch, is_told
):
  found = {}
  monkeypatch.setattr(rollcall, 'RollCall', lambda *_: None)
  monkeypatch.setattr(
    'jax.distributed.initialize', lambda *_, **x: found.update(x)
  )
  monkeypatch.setattr('jax.config.update', lambda *_: None)
  for name, value in (SLURM | {'SLURM_LOCALID': '3'}).items():
    monkeypatch.setenv(name, value)
  hosts.start(*(('host:1234', 2, 0) if is_told else ()))
  assert found.get('local_device_ids') == (None if is_told else [3])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('host:1', None, 0), 'give all three, or none'),
    (('host', 2, 0), "coordinator='host': expected <host>:<port>"),
    (('host:65535', 2, 0), 'a port below 65535'),
    (('host:1234', 2, 2), 'process_id=2 of --processes=2: expected 0 to 1'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(UserError, match=re.escape(message)):
    hosts.start(*arguments)


def test_alone_nothing_is_asked_and_nobody_waited_for():
  hosts.start()
  hosts.start('host:1234', 1, 0)
  assert hosts.of_first(lambda: 'x') == 'x'
  any_of = hosts.AnyOf()
  assert [any_of(x) for x in (False, True, False)] == [False, True, False]
  hosts.fail(1, 'nobody ends')
