"""Machines that are not here: what they are, and their own compilers.

A `Target` is named as in 'h100:8' (so many GPUs, eight to a host), 'h100' (one)
or 'v5p:2x2x2' (a slice of TPUs, as Google names them). Programs are compiled
for it by XLA's GPU compiler or by libtpu, without a GPU or TPU: the extras
`plan-gpu` and `plan-tpu` install these.

Figures are the makers' (dense bf16 arithmetic; links are what a device can send
at a time, which is half of what data sheets add up for both directions):

  NVIDIA A100, H100 and H200 data sheets (SXM, HGX); 400 Gb/s of network
    for each GPU, as in DGX H100, and 200 Gb/s as in DGX A100
  https://cloud.google.com/tpu/docs/v5e, v5p and v6e
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from pathlib import Path

import jax
from jax.experimental import topologies

from gakd_jax import UserError

# What the GPU compiler asks of a card that it cannot ask itself.
_GPU = {
  'threads_per_block_limit': 1024,
  'threads_per_warp': 32,
  'shared_memory_per_block': 49152,
  'block_dim_limit_x': 2147483647,
  'block_dim_limit_y': 65535,
  'block_dim_limit_z': 65535,
  'threads_per_core_limit': 2048,
  'registers_per_core_limit': 65536,
  'registers_per_block_limit': 65536,
}
_HOST = 8  # GPUs of a host


@dataclasses.dataclass(frozen=True)
class Kind:
  """Bytes, and bytes or operations a second, of one device."""

  title: str
  memory: float
  flops: float  # bf16
  bandwidth: float  # of its memory
  link: float  # to the devices of its host, or of its slice
  network: float | None = None  # to other hosts; None: the links go there too
  card: dict | None = None  # of a GPU: more for its compiler


_HOPPER = {
  'shared_memory_per_core': 233472,
  'shared_memory_per_block_optin': 232448,
  'core_count': 132,
  'fpus_per_core': 128,
  'l2_cache_size': 52428800,
  'clock_rate_ghz': 1.98,
  'capability': (9, 0),
}
KINDS = {
  'a100': Kind(
    'NVIDIA A100-SXM4-80GB',
    80e9,
    312e12,
    2.039e12,
    300e9,
    25e9,
    _HOPPER
    | {
      'shared_memory_per_core': 167936,
      'shared_memory_per_block_optin': 166912,
      'core_count': 108,
      'fpus_per_core': 64,
      'l2_cache_size': 41943040,
      'clock_rate_ghz': 1.41,
      'capability': (8, 0),
    },
  ),
  'h100': Kind(
    'NVIDIA H100 80GB HBM3', 80e9, 989e12, 3.35e12, 450e9, 50e9, _HOPPER
  ),
  'h200': Kind('NVIDIA H200', 141e9, 989e12, 4.8e12, 450e9, 50e9, _HOPPER),
  'v5e': Kind('TPU v5e', 16e9, 197e12, 0.819e12, 200e9),
  'v5p': Kind('TPU v5p', 95e9, 459e12, 2.765e12, 600e9),
  'v6e': Kind('TPU v6e', 32e9, 918e12, 1.64e12, 400e9),
}
# What `all` compares.
ALL = ('h100', 'a100:8', 'h100:8', 'h200:8', 'v5e:4x4', 'v6e:2x4', 'v5p:2x2x2')


@dataclasses.dataclass(frozen=True)
class Target:
  name: str
  kind: Kind
  devices: tuple  # to make a mesh of; nothing can be put on them
  options: dict  # of the compiler

  @property
  def is_gpu(self):
    return self.kind.card is not None

  def seconds(self, transfer):
    """What an `hlo.Transfer` takes at least.

    Between hosts, each device of a group sends a share of what its host has to
    (but for what only it has).
    """
    links = transfer.sent / self.kind.link
    members = [self._hosts[i] for i in transfer.groups[0]]
    hosts = len(set(members))
    if self.kind.network is None or hosts == 1:
      return links
    alone = transfer.kind in ('all-to-all', 'collective-permute')
    each = 1 if alone else len(members) // hosts
    crossing = transfer.sent_among(hosts) / each
    return max(links, crossing / self.kind.network)

  @functools.cached_property
  def _hosts(self):
    """{device: its host}, as a program counts devices."""
    return [d.process_index for d in self.devices]


def of(name):
  """The `Target` of a name.

  Raises:
    UserError: if it is unknown, or its compiler is not installed.
  """
  found = re.fullmatch(r'(\w+)(?::(\d+(?:x\d+)*))?', name)
  kind = found and KINDS.get(found[1])
  if not kind:
    raise UserError(
      f'--plan_target={name}: expected all, or one of {", ".join(KINDS)} with '
      'its size, as in h100:8 or v5p:2x2x2'
    )
  make = _gpu if kind.card else _tpu
  return make(name, kind, found[2])


def _gpu(name, kind, size):
  if size and 'x' in size:
    raise UserError(
      f'--plan_target={name}: of GPUs, name how many, as in {name[:4]}:8'
    )
  n = int(size or 1)
  if n < 1 or (n > _HOST and n % _HOST):
    raise UserError(
      f'--plan_target={name}: GPUs are 1 to {_HOST}, or hosts of {_HOST}'
    )
  _require(name, 'plan-gpu', 'jax_cuda12_plugin', 'nvidia.cuda_nvcc')
  hosts, each = max(1, n // _HOST), min(n, _HOST)
  toolkit = importlib.util.find_spec('nvidia.cuda_nvcc')
  options = {
    # It would run kernels on a card to choose between them.
    'xla_gpu_autotune_level': '0',
    'xla_gpu_cuda_data_dir': str(
      Path(next(iter(toolkit.submodule_search_locations)))
    ),
  }
  topology = topologies.get_topology_desc(
    name,
    'cuda',
    target_config=_card(kind),
    topology=f'1x{hosts}x{each}',  # slices, hosts, devices
  )
  return Target(name, kind, tuple(topology.devices), options)


def _card(kind):
  """A card as the GPU compiler reads it: a protobuf, in text."""
  card = dict(kind.card)
  major, minor = card.pop('capability')
  numbers = (
    _GPU
    | card
    | {
      'memory_bandwidth': int(kind.bandwidth),
      'device_memory_size': int(kind.memory),
    }
  )
  info = ' '.join(f'{k}: {v}' for k, v in numbers.items())
  return (
    f'gpu_device_info {{ {info} '
    f'cuda_compute_capability {{ major: {major} minor: {minor} }} }} '
    'platform_name: "CUDA" '
    'dnn_version_info { major: 9 minor: 10 patch: 0 } '
    f'device_description_str: "{kind.title}"'
  )


def _tpu(name, kind, size):
  _require(name, 'plan-tpu', 'libtpu')
  # Else libtpu asks Google's cloud what it runs on, and waits for an answer.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  prefix = name.partition(':')[0]
  if not size:
    raise UserError(
      f'--plan_target={name}: name the slice, as in {prefix}:'
      f'{"2x2x1" if prefix == "v5p" else "2x2"}'
    )
  bounds = {}
  if math.prod(map(int, size.split('x'))) == 1:
    bounds = {'chips_per_host_bounds': (1, 1, 1)}
  try:
    topology = topologies.get_topology_desc(name, 'tpu', **bounds)
  except jax.errors.JaxRuntimeError as e:
    reason = str(e).strip().splitlines()[0]
    raise UserError(f'--plan_target={name}: no such slice: {reason}') from e
  return Target(name, kind, tuple(topology.devices), {})


def _require(name, extra, *modules):
  for module in modules:
    try:
      found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
      found = None
    if found is None:
      raise UserError(
        f'--plan_target={name}: its compiler is not installed; '
        f"pip install 'gakd_jax[{extra}]'"
      )
