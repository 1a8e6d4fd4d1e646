"""Distillation methods. To add one: a file here, and its line in `make`."""

import dataclasses
import difflib

from gakd_jax import UserError
from gakd_jax.objectives import distillm2, gakd, kld, sft


def make(name, *, critic=None, head_chunk=512, **settings):
  """The objective of a config: `make('kld', divergence='jsd', beta=0.1)`.

  `critic` is the critic's shape, for methods that have one; `head_chunk` is
  `config.train`'s.
  """
  methods = {
    'sft': sft.SFT,
    'kld': kld.KLD,
    'gakd': gakd.GAKD,
    'distillm2': distillm2.DistiLLM2,
  }
  if name not in methods:
    raise UserError(
      f'config.objective: no method {name!r}; known are {", ".join(methods)}'
    )
  fields = {f.name for f in dataclasses.fields(methods[name])}
  known = sorted(fields - {'head_chunk', 'critic'})
  for key in settings:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f'did you mean {near[0]!r}? ' if near else ''
      raise UserError(
        f'config.objective: {name} has no setting {key!r}; {hint}'
        f'known are {", ".join(known) or "none"}'
      )
  if critic and 'critic' in fields:
    settings['critic'] = critic
  return methods[name](head_chunk=head_chunk, **settings)
