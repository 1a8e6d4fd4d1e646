"""ALM against recorded values."""

import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.data import segments
from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.objectives import alm
from gakd_jax.objectives.alm import ALM
from gakd_jax.objectives.base import Own
from tests.objectives import cross


@pytest.mark.parametrize(
  'name',
  [
    'alm_a_binary_ce',
    pytest.param('alm_b_abs', marks=pytest.mark.slow),
    pytest.param('alm_e_chunk_sizes_1_2', marks=pytest.mark.slow),
  ],
)
def test_recorded_values(name):
  z, meta = cross.golden(name)
  sides, align = [], {}
  for side in cross.SIDES:
    mask_BT = z[f'in.{side}_loss_mask'].copy()
    mask_BT[:, 0] = False
    ids_BT = z[f'in.{side}_ids']
    chunks_BTC = z[f'in.{side}_chunks'] & mask_BT[:, :, None]
    align[f'span_{side[0]}'] = np.where(
      chunks_BTC.any(2), chunks_BTC.argmax(2), -1
    ).astype(np.int32)
    sides.append(Tokens(ids_BT, np.ones_like(ids_BT), mask_BT))
  batch = Batch(*sides, align=align)
  space = meta['alm_mode'] == 'append_space'
  constants = {f'space_{s[0]}': z[f'in.{s}_space_ids'] for s in cross.SIDES}
  objective = ALM(
    kd=1.0,
    difference=meta['diff_fn'],
    space=space,
    sizes=tuple(meta['distill_chunk_sizes']),
    by_tokens=meta['numerator'] == 'token_count',
    head_chunk=5,
  )
  (loss, _), gradient = cross.run(
    objective,
    *cross.from_logits(z, batch),
    batch,
    Own(constants=constants if space else {}),
  )
  np.testing.assert_allclose(loss, z['out.loss'], rtol=1e-5)
  cross.assert_near(gradient, z['grad.loss'])


def test_what_is_joined_lies_in_one_piece():
  """Piece 2 is no text: what stands before it is not joined with the rest."""
  s_BT = jnp.array([[0, 1, 1, -1, 3, 4, 5, 6, 0, 7, 8]])
  t_BT = jnp.array([[0, 1, -1, -1, 3, 3, 4, 5, 6, 7, 8]])
  documents_BT = jnp.array([[0, *[1] * 7, 0, 2, 2]])
  for size, want in (
    (1, [[0, 1, 1, 0, 3, 4, 5, 6, 0, 7, 8], [0, 1, 0, 0, 3, 3, 4, 5, 6, 7, 8]]),
    (3, [[0, 1, 1, 0, 3, 3, 3, 6, 0, 7, 7], [0, 1, 0, 0, 3, 3, 3, 3, 6, 7, 7]]),
  ):
    got = (
      alm._joined(s_BT, documents_BT, size),
      alm._joined(t_BT, jnp.array([[0, *[1] * 8, 2, 2]]), size),
    )
    np.testing.assert_array_equal(np.concatenate(got), want)
    for joined_BT in got:
      ends = np.array(segments.is_last(joined_BT)[0])
      assert len({*np.array(joined_BT)[0, ends]}) == ends.sum()
