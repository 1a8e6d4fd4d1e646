"""Distillation methods. To add one: a file here, and its line in `make`."""

import dataclasses
import difflib

from gakd_jax import UserError
from gakd_jax.objectives import kld, sft


def make(name, **settings):
  """The objective of a config: `make('kld', divergence='jsd', beta=0.1)`."""
  methods = {'sft': sft.SFT, 'kld': kld.KLD}
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
  return methods[name](**settings)
