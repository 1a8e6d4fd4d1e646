"""A student is what is left of a larger model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from gakd_jax import UserError, build, models, plan, rundir, sharding, train
from gakd_jax.models import convert, cut, lora
from gakd_jax.models.transformer import split
from tools import make_goldens

CASES = sorted({*make_goldens.CASES} - {'qwen3_window', 'gemma2'})
IDS_BT = make_goldens.IDS_BT
SEGMENTS_BT = np.ones_like(IDS_BT)
TEXTS = [(IDS_BT, SEGMENTS_BT)]


@pytest.fixture
def model_of(tmp_path):
  def model_of(name):
    case = make_goldens.CASES[name]
    return models.load(make_goldens.write_directory(case, tmp_path / 'model'))

  return model_of


def changed(model, change):
  """The model with `change` applied to its flat parameters, as numpy."""
  definition, params = split(model)
  flat = {k: np.array(x) for k, x in convert.flatten(params).items()}
  change(flat)
  return nnx.merge(definition, convert.unflatten(flat))


def make(**settings):
  return cut.make(settings)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_what_does_nothing_goes_first(name, model_of, tmp_path):
  """Neurons, heads and a layer without effect: logits stay what they are."""
  model = model_of(name)
  c = model.config
  rng = np.random.default_rng(0)
  idle_LF = np.stack([rng.permutation(c.ff_width) < 9 for _ in range(3)])
  idle_l = 1

  def change(flat):
    for part in ('gate', 'up'):
      for kind, x in (
        (k, flat.get(f'blocks/mlp/{part}/{k}')) for k in ('kernel', 'bias')
      ):
        if x is not None:
          x[
            np.broadcast_to(
              idle_LF[:, None] if kind == 'kernel' else idle_LF, x.shape
            )
          ] = 0
    for name in ('attention/out', 'mlp/down'):
      for kind in ('kernel', 'bias'):
        if f'blocks/{name}/{kind}' in flat:
          flat[f'blocks/{name}/{kind}'][idle_l] = 0

  model = changed(model, change)
  keep = make(layers=2, by='importance', ff_width=c.ff_width - 9)
  small = cut.cut(model, keep, TEXTS)
  assert small.config == dataclasses.replace(
    c, layers=2, ff_width=c.ff_width - 9, windows=c.windows[:2]
  )
  want = model.logits(IDS_BT, SEGMENTS_BT)
  np.testing.assert_allclose(small.logits(IDS_BT, SEGMENTS_BT), want, atol=1e-4)
  models.save(small, tmp_path / 'small')
  again = models.load(tmp_path / 'small').logits(IDS_BT, SEGMENTS_BT)
  np.testing.assert_allclose(again, want, atol=1e-4)


@pytest.mark.parametrize(
  'name',
  [
    'qwen2_tied',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('qwen3_tied', 'llama_untied')
    ),
  ],
)
def test_heads_go_with_their_queries(name, model_of, tmp_path):
  model = model_of(name)
  c = model.config
  assert c.kv_heads == 2
  idle_L = [0, 1, 0]

  def change(flat):
    for kind in ('kernel', 'bias'):
      x = flat.get(f'blocks/attention/value/{kind}')
      if x is not None:
        for l, k in enumerate(idle_L):
          x[l, ..., k * c.head_dim : (k + 1) * c.head_dim] = 0

  model = changed(model, change)
  small = cut.cut(model, make(kv_heads=1), TEXTS)
  assert small.config == dataclasses.replace(c, kv_heads=1, heads=c.heads // 2)
  want = model.logits(IDS_BT, SEGMENTS_BT)
  np.testing.assert_allclose(small.logits(IDS_BT, SEGMENTS_BT), want, atol=1e-4)
  models.save(small, tmp_path / 'small')
  assert models.read_config(tmp_path / 'small') == small.config


def test_importance_is_of_text_alone(model_of):
  model = model_of('qwen3_tied')
  padded_BT = SEGMENTS_BT.copy()
  padded_BT[:, 6:] = 0
  other_BT = np.where(padded_BT, IDS_BT, 1)
  found, other = (
    cut.importance(model, [(ids, padded_BT)]) for ids in (IDS_BT, other_BT)
  )
  whole = cut.importance(model, TEXTS)
  twice = cut.importance(model, TEXTS * 2)
  for name, x in found.items():
    np.testing.assert_allclose(x, other[name], rtol=1e-5)
    assert not np.allclose(x, whole[name], rtol=1e-3)
  np.testing.assert_allclose(twice['layers'], whole['layers'], rtol=1e-5)
  with pytest.raises(UserError, match='no text to measure'):
    cut.importance(model, [])


def test_a_token_that_was_never_trained_hides_no_layer(model_of):
  model = model_of('qwen3_tied')

  def change(flat):
    (name,) = (k for k in flat if k.startswith('embed'))
    flat[name][IDS_BT[0, 3]] = 0

  before, after = (
    cut.importance(x, TEXTS)['layers'] for x in (model, changed(model, change))
  )
  assert np.isfinite(after).all()
  # A layer that makes something of nothing has changed what it read.
  assert after[0] > before[0]


def test_layers_by_place():
  config = models.DecoderConfig(
    **dict.fromkeys(('width', 'heads', 'kv_heads', 'head_dim'), 8),
    layers=30,
    vocab_size=9,
    ff_width=8,
    tied_head=True,
    rope_theta=1e4,
    norm_eps=1e-6,
    max_length=64,
  )

  def places(**keep):
    return make(**keep).places(config)

  assert places(layers=30) == [*range(30)] == places()
  assert places(layers=2) == [0, 29]
  assert places(layers=4) == [0, 10, 19, 29]
  assert places(layers=(3, 7)) == [3, 7]
  assert not make(layers=4).asks_data
  assert make(layers=4, by='importance').asks_data
  assert not make(layers=(1, 2), by='importance').asks_data
  for keep, said in (
    ({'layers': 31}, r'keep.layers=31: the model has 30'),
    ({'layers': (1, 30)}, r'the model has 30 layers'),
    ({'ff_width': 9}, 'the model has 8 ff_width'),
    ({'kv_heads': 9}, 'the model has 8 kv_heads'),
  ):
    with pytest.raises(UserError, match=said):
      make(**keep).shape(config)
  mixed = dataclasses.replace(config, windows=(4, 0) * 15)
  assert make(layers=(0, 3)).shape(mixed).windows == (4, 0)
  assert make(layers=(1, 3)).shape(mixed).windows == ()
  with pytest.raises(UserError, match='name the layers'):
    make(layers=3, by='importance').shape(mixed)


def test_what_no_model_of_the_family_can_be_is_refused(model_of):
  with pytest.raises(UserError, match='no gpt2 model has'):
    cut.cut(model_of('gpt2'), make(kv_heads=2), TEXTS)


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'qwen3'])
def test_a_width_that_transformers_refuses_is_refused(family, tmp_path):
  cases = {'qwen3': 'qwen3_window', 'llama': 'llama_untied'}
  case = make_goldens.CASES[cases.get(family, family)]
  path = make_goldens.write_directory(case, tmp_path / 'model')
  config = models.read_config(path, width=64, heads=8, kv_heads=4, windows=())
  if family == 'qwen3':
    assert make(kv_heads=3).shape(config).heads == 6
    return
  with pytest.raises(UserError, match='6 heads: transformers reads no'):
    make(kv_heads=3).shape(config)


@pytest.fixture
def config(tiny_model_dir, tmp_path):
  data = tmp_path / 'rows.jsonl'
  words = ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
  rows = [{'prompt': f'Say {x}.', 'response': x} for x in words]
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  c = base.get_config()
  c.student.path = c.teacher.path = str(tiny_model_dir(layers=4))
  c.student.keep = {'layers': 2, 'by': 'importance', 'ff_width': 24}
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.objective = {'name': 'kld'}
  c.data.train = c.data.validation = str(data)
  c.data.template = 'raw'
  c.data.max_length, c.data.max_prompt_length = 32, 24
  c.train.batch_size, c.train.steps, c.train.head_chunk = 4, 2, 16
  c.eval_every = 0
  c.mesh.data = 1
  c.report.trackers = ()
  return c


@pytest.mark.slow
@pytest.mark.parametrize('shards', [1, 2])
def test_a_run_cuts_its_student(config, tmp_path, shards):
  config.mesh.fsdp = shards
  config.train.steps = 0
  before = train.run(config, tmp_path / 'before')['best']['evaluators']
  found = models.read_config(tmp_path / 'before/best')
  assert (found.layers, found.ff_width) == (2, 24)
  whole = models.load(config.teacher.path)
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    run = build.build(config, tmp_path, mesh)
    texts = build.inputs.first_rows(config, run.models.tokenizer, 64)
  small = cut.cut(whole, cut.make(config.student.keep), texts)
  saved = models.load(tmp_path / 'before/best')
  for a, b in zip(
    *(jax.tree.leaves(split(x)[1]) for x in (small, saved)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  config.train.steps = 4
  config.optimizer.learning_rate = 1e-2
  after = train.run(config, tmp_path / 'run')['best']['evaluators']
  ce = [x['loss']['metrics']['ce']['mean'] for x in (before, after)]
  assert ce[1] < ce[0] - 0.5


@pytest.mark.slow
def test_a_plan_is_of_what_is_kept(config):
  mesh = sharding.make_mesh(**config.mesh)
  found = plan.make(config, mesh).parameters['student']
  config.student.keep = None
  c = models.read_config(config.student.path)
  whole = plan.make(config, mesh).parameters['student']
  block = 2 * c.width + 2 * c.head_dim  # norms
  block += 2 * c.width * c.head_dim * (c.heads + c.kv_heads)
  assert whole - found == 2 * (block + 3 * c.width * c.ff_width) + 2 * (
    3 * c.width * (c.ff_width - 24)
  )
  # A later stage starts from what an earlier one has cut.
  config.student.keep = {'layers': 2, 'ff_width': 24}
  later = config.copy_and_resolve_references()
  with later.unlocked():
    later.student.path, later.student.keep = 'stage:first', None
  later = rundir.stage_shapes(later, {'first': config})
  assert plan.make(later, mesh).parameters['student'] == found


def test_a_cut_is_no_base_of_adapters_and_has_no_other_shape(config, tmp_path):
  for name, value in (('lora', {'rank': 2}), ('shape', {'layers': 1})):
    other = config.copy_and_resolve_references()
    other.student[name] = value
    with pytest.raises(UserError, match=f'keep and config.student.{name} are'):
      train.run(other, tmp_path / 'run')


@pytest.mark.slow
def test_adapters_are_merged_into_what_is_cut(config, tmp_path):
  whole = models.load(config.student.path)
  lora.attach(whole, lora.make_config({'rank': 2}), seed=0)
  for adapter in lora.adapters(whole).values():
    adapter.b = jax.tree.map(lambda x: x + 0.1, adapter.b)
  models.save(whole, tmp_path / 'adapter')
  config.student.path = str(tmp_path / 'adapter')
  config.student.keep = {'layers': [0, 3]}
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    got = build.build(config, tmp_path / 'run', mesh).start()
  lora.merge(whole)
  small = cut.cut(whole, cut.make(config.student.keep))
  for a, b in zip(
    *(jax.tree.leaves(x) for x in (got, split(small)[1])), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-6)
