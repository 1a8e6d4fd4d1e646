"""Overlap against its formula on whole arrays, in float64."""

import jax.numpy as jnp
import numpy as np

from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import vocabularies
from gakd_jax.objectives.base import Own
from gakd_jax.objectives.mined import MinED
from gakd_jax.objectives.overlap import Overlap
from tests.objectives import cross

# Of 5 and 6 tokens, three spell the same.
S_IDS, T_IDS = np.array([0, 1, 3]), np.array([2, 4, 0])


def _inputs():
  """Four response tokens each, the first at 2."""
  rng = np.random.default_rng(0)
  sides, models = [], []
  for vocab in (5, 6):
    ids_1T = rng.integers(0, vocab, (1, 6), np.int32)
    mask_1T = np.arange(6)[None] > 1
    sides.append(Tokens(ids_1T, np.ones_like(ids_1T), mask_1T))
    z_1TV = rng.standard_normal((1, 6, vocab)).astype(np.float32)
    models.append(Outputs(jnp.asarray(z_1TV), Head(jnp.eye(vocab))))
  return models, sides


def test_a_mean_over_pairs_of_what_both_vocabularies_have():
  models, sides = _inputs()
  align = {'pairs_t': np.array([[-1, -1, 3, -1, 5, -1]], np.int32)}
  constants = vocabularies.shared_of(S_IDS, T_IDS, 5, 6)
  own = Own(constants={k: jnp.asarray(x) for k, x in constants.items()})
  objective = Overlap(
    kd=1.0, divergence='reverse_kl', temperature=2.0, head_chunk=2
  )
  (loss, _), _ = cross.run(objective, *models, Batch(*sides, align), own)
  z_q, z_p = (np.float64(x.hidden_BTD[0]) / 2 for x in models)
  want = 0
  for s, t in ((1, 2), (3, 4)):  # Where the two pairs are predicted.
    q, p = np.exp(z_q[s, S_IDS]), np.exp(z_p[t, T_IDS])
    q, p = q / q.sum(), p / p.sum()
    want += np.sum(q * np.log(q / p)) / 2
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_mined_lets_nobody_imitate_itself():
  """Of what the student wrote, what is paired with nothing teaches nothing."""
  models, sides = _inputs()
  constants = vocabularies.nearest_of(np.arange(6, dtype=np.int32) % 5, 5)
  own = Own(constants={k: jnp.asarray(x) for k, x in constants.items()})
  batch = Batch(*sides, {'dtw_t': np.full((1, 6), -1, np.int32)})
  for written in (False, True):
    batch = batch.replace(written_B=np.array([written]))
    (loss, _), gradient = cross.run(MinED(kd=1.0), *models, batch, own)
    assert (loss == 0) == written
    assert np.any(gradient) != written
