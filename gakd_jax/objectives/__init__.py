"""Distillation methods. To add one: a file here, and its line in `make`."""

from typing import Literal

from gakd_jax import settings as settings_lib
from gakd_jax.objectives import (
  alm,
  distillm2,
  dskd_cma,
  dskd_v2,
  gad,
  gakd,
  gold,
  kld,
  mcw,
  mined,
  multilevel_ot,
  overlap,
  sft,
  uld,
  xtoken,
)


def make(name, *, critic=None, head_chunk=512, **settings):
  """The objective of a config: `make('kld', divergence='jsd', beta=0.1)`.

  `critic` is the critic's shape, for methods that have one; `head_chunk` is
  `config.train`'s.
  """
  methods = {
    'sft': sft.SFT,
    'kld': kld.KLD,
    'gakd': gakd.GAKD,
    'gad': gad.GAD,
    'distillm2': distillm2.DistiLLM2,
    'uld': uld.ULD,
    'dskd_cma': dskd_cma.DSKD,
    'dskd_v2': dskd_v2.DSKDv2,
    'overlap': overlap.Overlap,
    'mined': mined.MinED,
    'gold': gold.GOLD,
    'alm': alm.ALM,
    'xtoken': xtoken.XToken,
    'mcw': mcw.MCW,
    'multilevel_ot': multilevel_ot.MultiLevelOT,
  }
  settings_lib.check('config.objective.name', name, Literal[*methods])
  known = settings_lib.types_of(methods[name], 'head_chunk', 'critic')
  settings = settings_lib.checked('config.objective.', settings, known, name)
  if critic and 'critic' in settings_lib.types_of(methods[name]):
    settings['critic'] = critic
  return methods[name](head_chunk=head_chunk, **settings)
