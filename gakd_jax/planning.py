"""What a run would take, on this machine or on others that are not here.

  python -m gakd_jax.main --config=configs/rkl_0p6b.py --plan \\
    --plan_devices=8 --plan_memory_gb=80 --plan_tflops=400
  python -m gakd_jax.main --config=configs/rkl_0p6b.py --plan \\
    --plan_target=h100:8

Without a target, the step is compiled for this CPU. A target's own compiler
tells its memory to the byte and what moves between devices; how long that takes
at least is by the maker's figures. `--plan_target=all` compares `targets.ALL`.
"""

import math

import jax

from gakd_jax import UserError, log, plan, rundir, sharding, targets

GB = 1e9


def run(config, memory_gb=None, tflops=None, target=None):
  """Prints the plan of a config, or of each of its stages.

  Args:
    config: see configs/base.py.
    memory_gb: of a device; the rows that fit into it are estimated.
    tflops: what a device sustains, 10^12 a second; gives the time of a step.
    target: see `targets.of`, or 'all'; None: this machine.
  """
  for name, limit in (('memory_gb', memory_gb), ('tflops', tflops)):
    if limit is not None and not 0 < limit < math.inf:
      raise UserError(f'--plan_{name}={limit} must be positive')
  if target not in (None, 'all'):
    target = targets.of(target)
  stages = dict(config.stages)
  for name, stage in stages.items() or [('', config)]:
    if name:
      print(f'== {name}')
    stage = rundir.stage_shapes(stage, stages)
    if stage.train.steps == 0:
      print('it trains nothing: there is no step to plan')
    elif target == 'all':
      _compare(stage)
    else:
      stage, mesh, made = _planned(stage, target)
      _show(made, stage, mesh, memory_gb, tflops, target)


def _planned(config, target):
  """(config as it is planned, mesh, `plan.Plan`)."""
  if target is None:
    mesh = _make_mesh(config.mesh)
  else:
    mesh = sharding.make_mesh(**config.mesh, devices=target.devices)
    if target.is_gpu and config.attention in ('auto', 'cudnn'):
      # jax asks a card for its cuDNN.
      config = config.copy_and_resolve_references()
      config.attention = 'chunked'
  return config, mesh, plan.make(config, mesh, target)


def _compare(config):
  """A table of what there is to rent, for one config; a target a row."""
  rows = []
  for name in targets.ALL:
    try:
      target = targets.of(name)
      _, _, made = _planned(config, target)
    except UserError as e:
      rows.append((name, *[''] * 6, str(e)))
      continue
    seconds = made.seconds(target)
    least = max(seconds.values())
    fits = made.peak <= target.kind.memory
    rows.append(
      (
        name,
        f'{made.peak / GB:.1f}',
        f'{target.kind.memory / GB:.0f}',
        f'{sum(made.sent().values()) / GB:.2f}',
        *(f'{seconds[k]:.3f}' for k in ('arithmetic', 'links')),
        f'{made.tokens / least:,.0f}',
        '' if fits else 'does not fit',
      )
    )
  log.print_table(
    (
      'target',
      'GB a device',
      'it has',
      'GB it sends',
      'arithmetic, s',
      'links, s',
      'tokens/s at most',
      '',
    ),
    rows,
    f'A step of {config.train.batch_size} rows of {config.data.max_length} '
    'tokens',
  )
  print(_BOUND)


_BOUND = (
  "bounds by the makers' figures: a step takes the largest of its times at "
  'least, and their sum where none is hidden behind another'
)


def _make_mesh(sizes):
  """The mesh; says how to plan for more devices than there are."""
  needed = math.prod(size for size in sizes.values() if size > 0)
  if needed > jax.device_count():
    raise UserError(
      f'config.mesh needs {needed} devices and this host has '
      f'{jax.device_count()}; add --plan_devices={needed} to plan for them '
      'here, on the CPU'
    )
  return sharding.make_mesh(**sizes)


def _show(made, config, mesh, memory_gb, tflops, target):
  c = config
  shape = ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  print(f'mesh: {shape} ({made.devices} devices)')
  rows = made.tokens // c.data.max_length  # Several of a prompt, perhaps.
  print(
    f'step: {rows} rows of {c.data.max_length} tokens, '
    f'{made.rows} rows a microbatch and device'
  )
  log.print_table(
    ('part', 'parameters'),
    [(name, f'{n:,}') for name, n in made.parameters.items()],
    'Parameters',
  )
  log.print_table(
    ('part', 'GB'),
    [
      (name, f'{n / GB:.2f}')
      for name, n in [*made.bytes.items(), ('peak', made.peak)]
    ],
    'Memory of a device',
  )
  total = sum(made.flops.values())
  log.print_table(
    ('part', 'GFLOP a token', 'TFLOP a step', 'share'),
    [
      (
        name,
        f'{n / made.tokens / 1e9:.3f}',
        f'{n / 1e12:.3f}',
        f'{n / total:.0%}',
      )
      for name, n in [*made.flops.items(), ('total', total)]
    ],
    'Operations',
  )
  if memory_gb is not None:
    rows = plan.rows_that_fit(made, config, mesh, memory_gb * GB, target)
    verdict = 'fits' if made.peak <= memory_gb * GB else 'does not fit'
    print(
      f'this step {verdict} in {memory_gb:g} GB; '
      f'{rows or "not even 1"} rows a microbatch and device do'
    )
  if tflops is not None:
    seconds = total / (made.devices * tflops * 1e12)
    print(
      f'a step takes {seconds:.3g} s at {tflops:g} TFLOP/s a device: '
      f'{made.tokens / seconds:,.0f} tokens/s'
    )
  if target is not None:
    _show_target(made, target)
  print(_sources(config, target))


def _show_target(made, target):
  """What a target adds: transfers, and bounds of a step's time."""
  sent = made.sent()
  if sent:
    log.print_table(
      ('kind', 'GB'),
      [
        (k, f'{n / GB:.3f}')
        for k, n in [*sent.items(), ('total', sum(sent.values()))]
      ],
      'What a device sends to others in a step',
    )
    if target.is_gpu:  # A TPU's program does not show it.
      print(f'{made.hidden() / GB:.3f} GB of it while something is computed')
  seconds = made.seconds(target)
  log.print_table(
    ('limited by', 's'),
    [(k, f'{s:.4f}') for k, s in seconds.items()],
    'Time of a step at the peak of what limits it',
  )
  memory, least = target.kind.memory, max(seconds.values())
  print(
    f'this step {"fits" if made.peak <= memory else "does not fit"} in the '
    f'{memory / GB:.0f} GB of {target.kind.title}; it takes {least:.3g} s at '
    f'least ({max(seconds, key=seconds.get)}, the rest hidden behind it), '
    f'{sum(seconds.values()):.3g} s if nothing is hidden'
  )


def _sources(config, target):
  if target is not None:
    text = (
      'from: shapes and shardings; temporaries and transfers by the compiler '
      f'for {target.kind.title} (jax {jax.__version__}); operations by '
      f'formula, every token a response; evaluations not included; {_BOUND}'
    )
    if target.is_gpu and config.attention == 'chunked':
      text += '; cuDNN is not compiled without a card: attention is chunked'
    return text
  text = (
    'from: shapes and shardings; temporaries by the compiler for '
    f'{jax.default_backend()} (jax {jax.__version__}); operations by formula, '
    'every token a response; evaluations not included'
  )
  if plan.widens(config):
    text += (
      f'; a CPU multiplies {config.train.precision} in float32, so that '
      'temporaries are larger here than on an accelerator'
    )
  return text
