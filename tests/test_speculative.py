"""Text that a student drafts and a teacher corrects.

Most tests have tables for models: what follows a token depends on it alone. So
the text is known, and its distribution in closed form.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx, struct

from gakd_jax import sampler, sampling, speculative
from gakd_jax.models import decoding, transformer
from gakd_jax.sampler import Sampler
from gakd_jax.speculative import Mixture, Probability, Rank

GREEDY = Sampler(temperature=0.0)


@struct.dataclass
class Table:
  """A reader whose logits after a token are a row of a table."""

  logits_VV: jax.Array

  @property
  def model(self):
    return self

  def head(self, hidden_NV):
    return hidden_NV

  def read(self, ids_BT, positions_BT):
    del positions_BT
    return self.logits_VV[ids_BT], self


@struct.dataclass
class Script(Table):
  """A reader whose logits depend on row and position, [B, S, V]."""

  def read(self, ids_BT, positions_BT):
    rows_B1 = jnp.arange(ids_BT.shape[0])[:, None]
    return self.logits_VV[rows_B1, positions_BT], self


def drafting(rule, gamma, max_new_tokens, eos_ids=(), **samplers):
  samplers = {'student': Sampler(), 'teacher': Sampler()} | samplers
  return speculative.Drafting(
    rule=rule,
    gamma=gamma,
    max_new_tokens=max_new_tokens,
    eos_ids=eos_ids,
    **samplers,
  )


def write(readers, last_B, keys_B, settings):
  """Responses [B, I] to prompts of one token, -1 after their end; the trace."""
  state = sampling.start(
    jnp.asarray(last_B, jnp.int32)[:, None],
    jnp.ones(len(last_B), jnp.int32),
    settings.max_new_tokens,
  )
  state, trace = jax.jit(
    functools.partial(speculative.write, settings=settings)
  )(readers, state, keys_B)
  state, trace = jax.device_get((state, trace))
  is_text_BI = np.arange(1, state.ids_BS.shape[1]) < state.end_B[:, None]
  ids_BI = np.where(is_text_BI, state.ids_BS[:, 1:], -1)
  by_teacher_BI = trace.by_teacher_BS[:, 1:]
  assert not by_teacher_BI[~is_text_BI].any()
  return ids_BI, by_teacher_BI, trace


@pytest.fixture
def numbers(monkeypatch):
  """`numbers(u_student_BI, u_teacher_BI)` -> keys of rows, which draw these."""

  def inject(u_student_BI, u_teacher_BI):
    B, I = u_student_BI.shape
    u_N = jnp.stack([u_student_BI, u_teacher_BI], dtype=jnp.float32).ravel()
    places = {speculative._TEACHER: B * I, speculative._ACCEPTANCE: 0}

    def fold_in(key, x):
      return key + (places[x] if isinstance(x, int) else x)

    monkeypatch.setattr(jax.random, 'fold_in', fold_in)
    monkeypatch.setattr(jax.random, 'uniform', lambda key: u_N[key])
    return I * jnp.arange(B)

  return inject


# What the published implementation's formulas give.


@pytest.fixture(scope='module')
def golden(shared_dir):
  def load(name):
    z = np.load(shared_dir / 'goldens' / f'{name}.npz')
    return {k: z[k] for k in z.files}, json.loads(str(z['meta']))

  return load


@pytest.mark.parametrize('name', ['skd_blocks_a', 'skd_blocks_c_gamma1'])
def test_blocks_are_the_golden_ones(name, golden, numbers):
  z, meta = golden(name)
  draft_BJ, z_BJV = z['in.draft'], z['in.teacher_logits']
  B, J = draft_BJ.shape
  s_BJV = jax.nn.one_hot(draft_BJ, meta['V'])
  u_BJ = z['in.u_teacher'][:, :J]
  for k in meta['Ks']:
    ids_BJ, by_teacher_BJ, _ = write(
      [Script(s_BJV), Script(jnp.array(z_BJV))],
      np.zeros(B),
      numbers(u_BJ, u_BJ),
      drafting(Rank(k), J, J, student=GREEDY),
    )
    accepted_B = z[f'out.paper.K{k}.n_accepted']
    first_B = np.argmax(np.c_[by_teacher_BJ, np.ones(B, bool)], axis=1)
    np.testing.assert_array_equal(first_B, accepted_B)
    # Later blocks go on after what the first one left.
    in_block_BJ = np.arange(J) <= accepted_B[:, None]
    np.testing.assert_array_equal(
      np.where(in_block_BJ, ids_BJ, -1), z[f'out.paper.K{k}.tokens']
    )


@pytest.mark.parametrize('gamma', [1, 3, 5, 8])
@pytest.mark.parametrize('name', ['skd_decode_a', 'skd_decode_c_onpolicy'])
def test_texts_are_the_golden_ones(name, gamma, golden, numbers):
  z, meta = golden(name)
  ids_BI, by_teacher_BI, trace = write(
    [Table(jnp.array(z[f'in.{m}_table'])) for m in ('student', 'teacher')],
    z['in.last_prompt_token'],
    numbers(z['in.u_student'], z['in.u_teacher']),
    drafting(Rank(meta['K']), gamma, meta['max_new'], (meta['eos'],)),
  )
  np.testing.assert_array_equal(ids_BI, z['out.tokens'])
  accepted_BI = np.where(ids_BI < 0, -1, ~by_teacher_BI)
  np.testing.assert_array_equal(accepted_BI, z['out.accepted'])
  calls_B = z[f'out.teacher_calls.gamma{gamma}']
  np.testing.assert_array_equal(trace.blocks_B, calls_B)
  # Nothing is counted twice: of the judged, what stayed is what is there.
  kept = np.sum(z['out.accepted'] == 1)
  assert np.sum(trace.kept_BJ) == kept
  assert np.sum(trace.judged_BJ) == kept + np.sum(by_teacher_BI)
