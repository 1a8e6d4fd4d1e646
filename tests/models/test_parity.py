"""Models against transformers: recorded values always, live with torch."""

import jax
import numpy as np
import pytest
from flax import nnx

from gakd_jax import models
from gakd_jax.models import cut
from gakd_jax.models.transformer import split
from tools import make_goldens

CASES = sorted(make_goldens.CASES)
IS_TEXT_BT = make_goldens.SEGMENTS_BT > 0


def our_logits(path):
  definition, params = split(models.load(path))
  logits = jax.jit(lambda p, *batch: nnx.merge(definition, p).logits(*batch))
  return logits(params, make_goldens.IDS_BT, make_goldens.SEGMENTS_BT)


@pytest.mark.parametrize('name', CASES)
def test_logits_equal_the_recorded_ones_of_transformers(name, tmp_path):
  case = make_goldens.CASES[name]
  golden = np.load(make_goldens.GOLDENS / f'{name}.npz')
  # Should numpy's stream ever change, record again.
  norm_D = make_goldens.final_norm(case)
  np.testing.assert_array_equal(norm_D, golden['norm_D'])
  got_BTV = our_logits(make_goldens.write_directory(case, tmp_path))
  want_BTV = golden['logits_BTV']
  assert want_BTV[IS_TEXT_BT].std() > 0.5  # not a comparison of zeros
  np.testing.assert_allclose(
    got_BTV[IS_TEXT_BT], want_BTV[IS_TEXT_BT], atol=1e-4, rtol=0
  )


@pytest.fixture
def quiet_transformers(caplog):
  """transformers logs, not warns; its logger does not propagate by itself."""
  import transformers

  transformers.logging.disable_progress_bar()
  transformers.logging.enable_propagation()
  yield caplog
  transformers.logging.disable_propagation()
  assert not caplog.records


@pytest.mark.torch
@pytest.mark.parametrize('name', CASES)
def test_transformers_writes_what_load_reads(
  name, tmp_path, quiet_transformers
):
  import transformers

  ours = make_goldens.write_directory(
    make_goldens.CASES[name], tmp_path / 'ours'
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(ours)
  theirs.save_pretrained(tmp_path / 'theirs')
  want_BTV = make_goldens.reference_logits(ours)
  np.testing.assert_allclose(
    want_BTV,
    np.load(make_goldens.GOLDENS / f'{name}.npz')['logits_BTV'],
    atol=1e-5,
  )
  np.testing.assert_allclose(
    our_logits(tmp_path / 'theirs')[IS_TEXT_BT],
    want_BTV[IS_TEXT_BT],
    atol=1e-4,
    rtol=0,
  )


@pytest.mark.torch
@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('max_shard_bytes', [10**9, 50_000])
def test_save_writes_what_transformers_reads(
  name, max_shard_bytes, tmp_path, quiet_transformers
):
  import transformers

  case = make_goldens.CASES[name]
  source = make_goldens.write_directory(case, tmp_path / 'source')
  models.save(models.load(source), tmp_path / 'saved', max_shard_bytes)
  _, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'saved', output_loading_info=True
  )
  assert not any(info.values()), info
  np.testing.assert_allclose(
    make_goldens.reference_logits(tmp_path / 'saved'),
    make_goldens.reference_logits(source),
    atol=1e-4,
    rtol=0,
  )


@pytest.mark.torch
@pytest.mark.parametrize('name', CASES)
def test_transformers_reads_what_was_cut(name, tmp_path, quiet_transformers):
  case = make_goldens.CASES[name]
  whole = models.load(make_goldens.write_directory(case, tmp_path / 'whole'))
  texts = [(make_goldens.IDS_BT, make_goldens.SEGMENTS_BT)]
  keep = {'layers': (0, 2), 'ff_width': whole.config.ff_width - 9}
  small = cut.cut(whole, cut.make(keep), texts)
  models.save(small, tmp_path / 'small')
  ours_BTV = small.logits(make_goldens.IDS_BT, make_goldens.SEGMENTS_BT)
  np.testing.assert_allclose(
    ours_BTV[IS_TEXT_BT],
    make_goldens.reference_logits(tmp_path / 'small')[IS_TEXT_BT],
    atol=1e-4,
    rtol=0,
  )
