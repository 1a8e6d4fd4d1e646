"""Recorded values of methods for two tokenizers, as this project's inputs.

In `FOLDER`, which lies beside the repository: small inputs (`in.`), and what
the published implementations give on them in fp64 (`out.`, `mid.`, gradients
`grad.`).
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.data.pipeline import Tokens
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives.base import Own

SIDES = 'student', 'teacher'
FOLDER = Path(__file__).parents[3] / 'shared/goldens'


@functools.cache
def golden(name):
  """{array: value} of a file, and its settings."""
  if not FOLDER.is_dir():
    pytest.skip(f'{FOLDER} is not there')
  with np.load(FOLDER / f'{name}.npz') as z:
    arrays = {key: z[key] for key in z.files if key != 'meta'}
    return arrays, json.loads(str(z['meta']))


def shifted(z, side):
  """`Tokens` of a file whose label n is what position n predicts.

  One position longer than its arrays: what the last label is.
  """
  labels_BT = z[f'in.{side}_labels']
  ids_BT = z.get(f'in.{side}_ids', np.zeros_like(labels_BT))
  ids_BT = np.pad(ids_BT, ((0, 0), (0, 1)))
  mask_BT = np.pad(labels_BT != -100, ((0, 0), (1, 0)))
  ids_BT = np.where(mask_BT, np.pad(labels_BT, ((0, 0), (1, 0))), ids_BT)
  real_BT = np.pad(
    z.get(f'in.{side}_mask', labels_BT != -100), ((0, 0), (0, 1))
  )
  real_BT = (real_BT > 0) | mask_BT
  return Tokens(ids_BT, _up_to_last(real_BT), mask_BT)


def unshifted(z, side):
  """`Tokens` of a file whose label n is the token n itself."""
  labels_BT = z[f'in.{side}_labels']
  mask_BT = labels_BT != -100
  ids_BT = z.get(f'in.{side}_ids', np.where(mask_BT, labels_BT, 0))
  return Tokens(ids_BT, _up_to_last(mask_BT), mask_BT)


def _up_to_last(real_BT):
  """One segment a row, to the last that is real."""
  return (np.cumsum(real_BT[:, ::-1], axis=1)[:, ::-1] > 0).astype(np.int32)


def without_last(tokens):
  """The last token of each response is none."""
  mask_BT = tokens.mask_BT & np.pad(tokens.mask_BT, ((0, 0), (0, 1)))[:, 1:]
  return tokens.replace(mask_BT=mask_BT)


def from_logits(z, batch):
  """`Outputs` of both with the logits of a file."""
  return [
    _outputs(z[f'in.{side}_logits'], getattr(batch, side), None)
    for side in SIDES
  ]


def from_heads(z, batch):
  """`Outputs` of both with the hidden states, heads, embeddings of a file."""
  return [
    _outputs(
      z[f'in.{side}_hidden'], getattr(batch, side), z[f'in.{side}_head']
    ).replace(embedding_VD=jax.tree.map(jnp.asarray, z.get(f'in.{side}_embed')))
    for side in SIDES
  ]


def projectors(z, *names, prefix='in'):
  """`extra` of affine maps of these names, those that a file has."""
  return {
    name: {
      'kernel': jnp.asarray(z[f'{prefix}.{name}_w'].T),
      'bias': jnp.asarray(z[f'{prefix}.{name}_b']),
    }
    for name in names
    if f'{prefix}.{name}_w' in z
  }


def _outputs(hidden_BTD, tokens, head_VD):
  """Zeros where the text is longer; None: hidden states are logits."""
  more = tokens.ids_BT.shape[1] - hidden_BTD.shape[1]
  hidden_BTD = jnp.pad(jnp.asarray(hidden_BTD), ((0, 0), (0, more), (0, 0)))
  if head_VD is None:
    head_VD = jnp.eye(hidden_BTD.shape[2])
  return Outputs(hidden_BTD, Head(jnp.asarray(head_VD)))


def run(objective, student, teacher, batch, own=None, wanted=None):
  """(loss, metrics), and the gradient in the student's hidden states.

  wanted: 'all' for those in (hidden states, head, extra).
  """
  own = own or Own()
  batch = batch.replace(totals=objective.count(batch))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def value(trained, batch, teacher, constants):
    hidden_BTD, head_VD, extra = trained
    changed = student.replace(
      hidden_BTD=hidden_BTD, head=student.head.replace(weight_VD=head_VD)
    )
    total, metrics = 0, {}
    for term in objective.terms().values():
      new_own = own.replace(extra=extra, constants=constants)
      loss, new = term(changed, teacher, batch, new_own, jax.random.key(0))
      total, metrics = total + loss, metrics | new
    return total, metrics

  trained = student.hidden_BTD, student.head.weight_VD, own.extra
  values, gradients = value(trained, batch, teacher, own.constants)
  return values, gradients if wanted == 'all' else gradients[0]


def assert_near(got, want, rtol=1e-4):
  """Relative to the largest entry."""
  want = np.asarray(want)
  np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())
