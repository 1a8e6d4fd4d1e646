"""X-Token against its formulas on whole arrays, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import vocabularies
from gakd_jax.objectives.base import Own
from gakd_jax.objectives.xtoken import XToken
from tests.objectives import cross

# The student's `ab` is two of the teacher's tokens, and no token is `y`.
S_STRINGS, T_STRINGS = (
  ['a', 'b', 'ab', 'c', 'd'],
  ['c', 'b', 'a', 'y', 'd', 'z'],
)
W_VU = np.zeros((5, 6))
for _s, _t, _w in [(0, 2, 1), (1, 1, 1), (3, 0, 1), (4, 4, 1)]:
  W_VU[_s, _t] = _w
W_VU[2, [2, 1]] = [2 / 3, 1 / 3]
CONSTANTS = vocabularies.projection_of(
  S_STRINGS, T_STRINGS, [True] * 5, V=5, U=6, decay=0.5
)


def _softmax(z):
  z = np.exp(z - z.max(axis=-1, keepdims=True))
  return z / z.sum(axis=-1, keepdims=True)


def _inputs():
  """Tokens 1 to 3 of the student in two spans, 2 to 5 of the teacher."""
  rng = np.random.default_rng(0)
  sides, models = [], []
  for length, vocab, first in ((5, 5, 1), (7, 6, 2)):
    ids_1T = rng.integers(0, vocab, (1, length), np.int32)
    at_1T = np.arange(length)[None]
    mask_1T = (at_1T >= first) & (at_1T < length - 1)
    sides.append(Tokens(ids_1T, (at_1T < length - 1).astype(np.int32), mask_1T))
    z_1TV = rng.standard_normal((1, length, vocab)).astype(np.float32)
    models.append(Outputs(jnp.asarray(z_1TV), Head(jnp.eye(vocab))))
  align = {
    'span_s': np.array([[-1, 0, 1, 1, -1]], np.int32),
    'span_t': np.array([[-1, -1, 0, 0, 1, 1, -1]], np.int32),
  }
  return models, Batch(*sides, align)


def _of_spans(z_TV, spans):
  """Softmax of the mean logits of each, in float64."""
  return [_softmax(np.float64(z_TV)[rows].mean(axis=0)) for rows in spans]


@pytest.mark.parametrize('hybrid', [False, True])
def test_direct_computation(hybrid):
  (student, teacher), batch = _inputs()
  objective = XToken(kd=1.0, temperature=2.0, hybrid=hybrid, head_chunk=2)
  own = Own(constants={k: jnp.asarray(x) for k, x in CONSTANTS.items()})

  def direct(z_TV):
    total = 0
    for q_V, p_U in zip(
      _of_spans(z_TV / 2, [[0], [1, 2]]),
      _of_spans(np.asarray(teacher.hidden_BTD[0]) / 2, [[1, 2], [3, 4]]),
      strict=True,
    ):
      if hybrid:  # a, b, c and d are pairs; `ab` is left, and y and z.
        p_V, left = p_U[[2, 1, 0, 4]], np.sort(p_U[[3, 5]])[::-1]
        total += np.sum(p_V * np.log(p_V / q_V[[0, 1, 3, 4]]))
        total += abs(left[0] - q_V[2]) + left[1]
      else:
        reached = [0, 1, 2, 4]
        p_U = p_U[reached] / p_U[reached].sum()
        total += np.sum(p_U * np.log(p_U / (q_V @ W_VU)[reached]))
    return 4 * total / 2  # T^2, and a mean over spans

  (loss, metrics), gradient = cross.run(objective, student, teacher, batch, own)
  z_TV = np.float64(student.hidden_BTD[0])
  np.testing.assert_allclose(loss, direct(z_TV), rtol=1e-5)
  np.testing.assert_allclose(metrics['xtoken'], loss, rtol=1e-6)
  want_TV = np.zeros_like(z_TV)
  for at in np.ndindex(*z_TV.shape):
    step = np.zeros_like(z_TV)
    step[at] = 1e-5
    want_TV[at] = (direct(z_TV + step) - direct(z_TV - step)) / 2e-5
  cross.assert_near(gradient[0], want_TV)
