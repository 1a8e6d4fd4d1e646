"""What starts the program on several hosts."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.test_hosts import ROOT, STEPS, config_file, losses, of, when_at

LAUNCH = ROOT / 'launch'
ENV = os.environ | {'PYTHON': sys.executable, 'JAX_NUM_CPU_DEVICES': '2'}
__all__ = ['config_file']


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='no shellcheck')
def test_shell_scripts_are_sound():
  scripts = sorted(LAUNCH.glob('*.sh'))
  assert len(scripts) == 3
  subprocess.run(['shellcheck', *scripts], check=True)


@pytest.mark.parametrize('script', ['local.sh', 'slurm.sh', 'tpu_vm.sh'])
def test_how_it_is_used_is_said(script):
  done = subprocess.run([LAUNCH / script], capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith('usage: ')


def test_jobset_starts_as_many_processes_as_it_says():
  job_set = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
  assert job_set['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert job_set['kind'] == 'JobSet'
  (hosts,) = job_set['spec']['replicatedJobs']
  job = hosts['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  env = {x['name']: x.get('value') for x in container['env']}
  assert job['completionMode'] == 'Indexed'
  assert job['parallelism'] == job['completions'] == int(env['PROCESSES'])
  # All start again together, and not where it would be in vain.
  assert (job['backoffLimit'], pod['restartPolicy']) == (0, 'Never')
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['containerName'] == container['name']
  assert rule['onExitCodes']['values'] == [2]
  arguments = dict(x.split('=', 1) for x in container['args'])
  name = job_set['metadata']['name']
  first, port = arguments['--coordinator'].split(':')
  assert first == f'{name}-{hosts["name"]}-0-0.{name}'
  ports = [x['containerPort'] for x in container['ports']]
  assert ports == [int(port), int(port) + 1]
  assert arguments['--processes'] == '$(PROCESSES)'
  assert arguments['--process_id'] == '$(PROCESS_ID)'
  claimed = {x['name'] for x in pod['volumes']}
  assert claimed == {x['name'] for x in container['volumeMounts']}


@pytest.mark.slow
def test_local_goes_on_after_a_preemption(config_file, tmp_path):
  """One process is told to go: all stop, and start again to the end."""
  arguments = of(config_file, tmp_path / 'run')
  launcher = subprocess.Popen(
    [LAUNCH / 'local.sh', '2', '-m', 'gakd_jax.main', *arguments],
    env=ENV | {'LOGS': str(tmp_path)},
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  when_at(3, [launcher], tmp_path / 'run')
  (second,) = pids('--process_id=1', tmp_path)
  os.kill(second, signal.SIGTERM)
  out, err = launcher.communicate(timeout=300)
  assert launcher.returncode == 0, err
  assert 'exit 130: starting again, 1 of 3' in err
  assert re.search(r'continuing from step \d+', out)
  assert list(losses(tmp_path / 'run')) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize('error', ['signal', 'user'])
def test_local_does_not_start_again_in_vain(config_file, tmp_path, error):
  arguments = of(config_file, tmp_path / 'run')
  if error == 'user':
    arguments += ['--config.data.template=none']
  launcher = subprocess.Popen(
    [LAUNCH / 'local.sh', '2', '-m', 'gakd_jax.main', *arguments],
    env=ENV,
    cwd=ROOT,
    text=True,
    stderr=subprocess.PIPE,
  )
  if error == 'signal':
    when_at(3, [launcher], tmp_path / 'run')
    launcher.send_signal(signal.SIGTERM)
  _, err = launcher.communicate(timeout=300)
  assert launcher.returncode == (130 if error == 'signal' else 2), err
  assert 'starting again' not in err
  assert not pids(str(tmp_path / 'run'))


def test_local_is_stopped_as_it_looks_for_a_port(tmp_path):
  python = tmp_path / 'python'
  python.write_text(
    '#!/usr/bin/env bash\n'
    '[[ $1 == - ]] || sleep 60\n'
    'kill $(ps -o ppid= -p $PPID)\n'
    'echo 12345\n'
  )
  python.chmod(0o755)
  launcher = subprocess.run(
    [LAUNCH / 'local.sh', '2', '-m', 'gakd_jax.main'],
    env=ENV | {'PYTHON': str(python), 'LOGS': str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=20,
  )
  assert launcher.returncode == 130, launcher.stderr


def pids(*words):
  """Of processes in whose command lines these are."""
  found = []
  for path in Path('/proc').glob('[0-9]*/cmdline'):
    try:
      line = path.read_text().replace('\0', ' ')
    except OSError:  # It has gone.
      continue
    if 'local.sh' not in line and all(
      str(word) in line for word in ('gakd_jax.main', *words)
    ):
      found.append(int(path.parent.name))
  return found


def has_slurm():
  """Whether there is one that has a node for us."""
  if not shutil.which('srun'):
    return False
  nodes = subprocess.run(
    ['sinfo', '--noheader', '--states=idle', '--format=%D'],
    capture_output=True,
    text=True,
  )
  return nodes.returncode == 0 and nodes.stdout.strip() not in ('', '0')


@pytest.mark.slow
def test_two_tasks_of_slurm_are_one_run(config_file, tmp_path):
  """Preempted once: the job is queued again, and finishes."""
  if not has_slurm():
    pytest.skip('no SLURM')
  sent = subprocess.run(
    [
      *('sbatch', '--parsable', '--nodes=1', '--ntasks-per-node=2'),
      *('--gpus-per-node=0', '--cpus-per-task=1', f'--output={tmp_path}/log'),
      *(LAUNCH / 'slurm.sh', '-m', 'gakd_jax.main'),
      *of(config_file, tmp_path / 'run'),
    ],
    env=ENV,
    cwd=ROOT,
    text=True,
    capture_output=True,
    check=True,
  )
  job = sent.stdout.strip()

  def state():
    asked = ['squeue', '--noheader', f'--jobs={job}', '--format=%T']
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()

  when_at(3, [], tmp_path / 'run')
  subprocess.run(['scancel', '--signal=TERM', f'{job}.0'], check=True)
  deadline = time.monotonic() + 600
  while state() not in ('', 'COMPLETED'):
    assert time.monotonic() < deadline
    time.sleep(1)
  said = (tmp_path / 'log').read_text()
  assert 'exit 130: queued again' in said
  assert re.search(r'0: continuing from step \d+', said)
  assert list(losses(tmp_path / 'run')) == list(range(1, STEPS + 1))
