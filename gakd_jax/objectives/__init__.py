"""Distillation methods. To add one: a file here, and its line in `make`."""

import dataclasses
import difflib

from gakd_jax import UserError
from gakd_jax.objectives import gakd, kld, sft


def make(name, *, critic=None, **settings):
  """The objective of a config: `make('kld', divergence='jsd', beta=0.1)`.

  `critic` is the critic's shape, for methods that have one.
  """
  methods = {'sft': sft.SFT, 'kld': kld.KLD, 'gakd': gakd.GAKD}
  if name not in methods:
    raise UserError(
      f'config.objective: no method {name!r}; known are {", ".join(methods)}'
    )
  known = [f.name for f in dataclasses.fields(methods[name])]
  for key in settings:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f'did you mean {near[0]!r}? ' if near else ''
      raise UserError(
        f'config.objective: {name} has no setting {key!r}; {hint}'
        f'known are {", ".join(known)}'
      )
  if critic and 'critic' in known:
    settings['critic'] = critic
  return methods[name](**settings)
