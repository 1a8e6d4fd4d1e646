"""A run that trains adapters: what moves, what is saved, who goes on."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from configs import base
from gakd_jax import UserError, chosen, models, objectives, optim, step, train
from gakd_jax.data import pipeline
from gakd_jax.models import convert, lora, pair, quantized, transformer
from gakd_jax.objectives.base import Own
from tests.written import value

B, T, V, D = 4, 10, 90, 16
CONFIG = models.DecoderConfig(
  vocab_size=V,
  width=D,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  ff_width=24,
  tied_head=True,
  rope_theta=1e4,
  norm_eps=1e-6,
  max_length=T,
)
RATE = 1e-2


def _batch():
  rng = np.random.default_rng(0)
  bins = [
    [(rng.integers(0, V, 2, np.int32), rng.integers(0, V, n, np.int32))]
    for n in (8, 3, 5, 1)
  ]
  tokens = pipeline.collate(bins, T, pad_id=0)
  return pipeline.Batch(student=tokens, teacher=tokens)


def _student(dropout=0.0):
  """A definition, its adapters (B random) and its base."""
  model = models.Decoder(CONFIG, nnx.Rngs(0))
  lora.attach(model, lora.LoRAConfig(3, 6.0, dropout), seed=0)
  definition, params = transformer.split(model)
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)),
    params,
  )
  return definition, *lora.partition(params)


def _models(definition, base, teacher=None, t_params=None, remat='none'):
  """Of these parts; `base` {} is of a student that is trained whole."""
  frozen = {'student': base} if base else {}
  if teacher is not None:
    frozen['teacher'] = t_params
  return pair.Models(
    definition, teacher, CONFIG, CONFIG, frozen, jnp.dtype('float32'), remat
  )


def _step(params, objective=None, microbatches=1):
  schedule = optim.make_schedule(RATE, 10)
  optimizer = optim.make(schedule, eps=1e-4)
  state = step.init_state(params, Own(), optimizer, None)
  train_step = step.make_train_step(
    objective or objectives.make('sft', head_chunk=7),
    optimizer,
    schedule,
    seed=0,
    microbatches=microbatches,
  )
  return train_step, state


@pytest.mark.slow
def test_a_step_moves_the_adapters_as_optax_does_and_nothing_else():
  definition, adapters, frozen = _student()
  batch = _batch()

  def loss(adapters):
    model = nnx.merge(definition, lora.combine(adapters, frozen))
    tokens = batch.student
    log_q = jax.nn.log_softmax(model.logits(tokens.ids_BT, tokens.segments_BT))
    b, t = np.nonzero(tokens.mask_BT)
    return -jnp.mean(log_q[b, t - 1, tokens.ids_BT[b, t]])

  @jax.jit
  def by_hand(adapters):
    adam = optax.adamw(RATE, eps=1e-4, weight_decay=0.0)
    grads = jax.grad(loss)(adapters)
    updates, _ = adam.update(grads, adam.init(adapters), adapters)
    return optax.apply_updates(adapters, updates)

  want = by_hand(adapters)
  for microbatches in (1, 2):
    fn, state = _step(jax.tree.map(jnp.copy, adapters), None, microbatches)
    got, _ = fn(state, _models(definition, frozen), batch)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      got.params['student'],
      want,
    )
  assert (
    sum(x.size for x in jax.tree.leaves(got.opt_state))
    <= 1 + 2 * sum(x.size for x in jax.tree.leaves(adapters)) + 1
  )


@pytest.mark.slow
def test_dropout_is_drawn_anew_each_step_and_not_in_another_run():
  definition, adapters, frozen = _student(dropout=0.3)
  fn, state = _step(adapters)

  def losses(at):
    now = jax.tree.map(jnp.copy, state.replace(step=jnp.int32(at)))
    return float(fn(now, _models(definition, frozen), _batch())[1]['loss'])

  assert losses(0) == losses(0)
  assert abs(losses(0) - losses(1)) > 1e-3


@pytest.mark.slow
def test_a_frozen_head_has_no_gradient():
  """Arrays of its size that the loop over chunks carries: itself alone."""
  definition, adapters, frozen = _student()
  plain = models.Decoder(CONFIG, nnx.Rngs(0))
  whole_definition, whole = transformer.split(plain)
  carried = []
  for both, params in (
    (_models(definition, frozen), adapters),
    (_models(whole_definition, {}), whole),
  ):
    fn, state = _step(params)
    text = fn.lower(state, both, _batch()).compile().as_text()
    loops = [line for line in text.split('\n') if re.search(r' while\(', line)]
    carried.append(max(line.count(f'f32[{V},{D}]') for line in loops))
  assert carried == [1, 2]


def _quantized(definition, params, kind):
  model = nnx.merge(definition, params)
  for linear in lora.projections(model).values():
    linear.quantize(kind)
  return transformer.split(model)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'blocks'])
def test_a_quantized_base_and_teacher_train_as_their_widened_copies(remat):
  definition, adapters, frozen = _student()
  teacher, t_params = transformer.split(models.Decoder(CONFIG, nnx.Rngs(2)))
  objective = objectives.make('kld', head_chunk=7)

  low, low_params = _quantized(
    definition, lora.combine(adapters, frozen), 'int8'
  )
  low_teacher, low_t_params = _quantized(teacher, t_params, 'int8')
  _, low_frozen = lora.partition(low_params)

  def widened(params):
    flat = convert.flatten(params)
    scales = [name for name in flat if name.endswith('_scale')]
    for name in scales:
      flat[name.removesuffix('_scale')] *= flat.pop(name)
    return convert.unflatten(flat)

  after = []
  for student, teacher_now, base_tree, t_tree in (
    (low, low_teacher, low_frozen, low_t_params),
    (definition, teacher, widened(low_frozen), widened(low_t_params)),
  ):
    fn, state = _step(jax.tree.map(jnp.copy, adapters), objective)
    both = _models(student, base_tree, teacher_now, t_tree, remat)
    before = jax.tree.map(np.array, both.frozen)
    state, metrics = fn(state, both, _batch())
    jax.tree.map(np.testing.assert_array_equal, both.frozen, before)
    after.append((state.params['student'], metrics['loss']))
  assert jax.tree.structure(after[0][0]) == jax.tree.structure(adapters)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *after)


@pytest.fixture(scope='module')
def data_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'rows.jsonl'
  words = ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
  rows = [{'prompt': f'Repeat {w}.', 'response': w} for w in words]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


@pytest.fixture
def config(tiny_model_dir, data_file):
  c = base.get_config()
  c.student.path = str(tiny_model_dir())
  c.student.lora = {'rank': 2, 'alpha': 4.0, 'dropout': 0.1, 'targets': 'mlp'}
  c.student.dtype = c.train.precision = 'float32'
  c.data.train = c.data.validation = data_file
  c.data.template = 'chat'
  c.data.max_length = 48
  c.data.max_prompt_length = 32
  c.data.buckets = (48,)
  c.objective = {'name': 'sft'}
  c.optimizer.learning_rate = 1e-2
  c.train.batch_size = 8
  c.train.steps = 3
  c.train.head_chunk = 16
  c.mesh.data = 1
  c.evals = {'loss': {'batch_size': 8}}
  return c


def _adapters(workdir):
  return safetensors.numpy.load_file(
    workdir / 'best' / 'adapter_model.safetensors'
  )


@pytest.mark.slow
def test_a_run_writes_adapters_and_the_next_goes_on_with_them(config, tmp_path):
  config.train.steps = 3
  first = train.run(config, tmp_path / 'first')
  best = tmp_path / 'first' / 'best'
  # The best model, loaded, is the one that was measured.
  assert (best / 'tokenizer.json').exists()
  assert not (best / 'model.safetensors').exists()
  assert len(_adapters(tmp_path / 'first')) == 3 * 2 * 2
  saved = (tmp_path / 'first/checkpoints/3/state/_METADATA').read_text()
  assert 'lora' in saved
  assert 'kernel' not in saved
  assert 'embedding' not in saved

  config.student.path = str(best)
  config.optimizer.learning_rate = config.optimizer.end = 1e-9
  second = train.run(config, tmp_path / 'second')
  assert value(second['best'], 'loss/ce') == pytest.approx(
    value(first['best'], 'loss/ce'), rel=1e-5
  )

  # As a teacher it is base and adapter; to train all weights, it is merged.
  config.teacher.path = str(best)
  config.student.lora = None
  config.objective = {'name': 'kld'}
  third = train.run(config, tmp_path / 'third')
  assert value(third['best'], 'loss/ce') == pytest.approx(
    value(first['best'], 'loss/ce'), rel=1e-4
  )
  assert value(third['best'], 'loss/forward_kl') == pytest.approx(0, abs=1e-5)
  assert (tmp_path / 'third' / 'best' / 'model.safetensors').exists()


@pytest.mark.slow
def test_adapters_are_measured_as_they_were_exported(config, tmp_path):
  """Those of step 0, which training makes worse."""
  config.train.steps = 2
  config.optimizer.learning_rate = 10.0
  config.eval_first, config.eval_every = True, 1
  loss = {'kind': 'loss', 'batch_size': 8}
  config.evals = {'loss': loss, 'late': loss | {'every': 0}}
  config.checkpoint.best_metric = 'loss/ce'

  def late(run, *args):
    found = evaluate(run, *args)
    if found['step'] == 0 and len(found['evaluators']) == 2:
      del found['evaluators']['late']
    return found

  evaluate = chosen.evaluate
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chosen, 'evaluate', late)
    best = train.run(config, tmp_path)['best']
  assert best['step'] == 0
  expected = pytest.approx(value(best, 'loss/ce'), rel=1e-5)
  assert value(best, 'late/ce') == expected


@pytest.mark.parametrize(
  ('changes', 'word'),
  [
    ({'rank': 3}, 'rank 2, not 3'),
    ({'alpha': 8.0}, 'alpha 4, not 8.0'),
    ({'targets': 'up'}, 'mlp/down has one'),
    ({'targets': ''}, 'attention/key has none'),
    ({'rnak': 3}, "no setting 'rnak'"),
  ],
)
def test_other_adapters_than_the_ones_it_starts_from_are_refused(
  config, changes, word, tmp_path
):
  model = models.load(config.student.path)
  lora.attach(model, lora.make_config(config.student.lora), 0)
  models.save(model, tmp_path / 'adapter')
  config.student.path = str(tmp_path / 'adapter')
  config.student.lora = dict(config.student.lora) | changes
  with pytest.raises(UserError, match=word):
    train.run(config, tmp_path / 'run')


@pytest.mark.slow
def test_a_run_on_quantized_models_is_the_same_on_a_mesh(
  config, tmp_path, monkeypatch
):
  quantize, kinds = quantized.quantize, []

  def spy(kernel_LIO, kind):
    kinds.append(kind)
    return quantize(kernel_LIO, kind)

  monkeypatch.setattr(quantized, 'quantize', spy)
  config.teacher.path = config.student.path
  config.teacher.dtype = 'float32'
  config.objective = {'name': 'kld'}
  config.student.quantize, config.teacher.quantize = 'nf4', 'int8'
  one = train.run(config, tmp_path / 'one')
  # Seven projections, each as a shape and as it is read.
  assert kinds == ['nf4'] * 14 + ['int8'] * 14
  best = tmp_path / 'one' / 'best'
  saved = (tmp_path / 'one/checkpoints/3/state/_METADATA').read_text()
  assert 'kernel' not in saved
  config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 2
  eight = train.run(config, tmp_path / 'eight')
  for name in ('loss/ce', 'loss/forward_kl'):
    expected = pytest.approx(value(one['best'], name), rel=1e-3)
    assert value(eight['best'], name) == expected
  # What was trained goes on the base in its own precision, and is merged there.
  model = models.load(best)
  flat = convert.flatten(transformer.split(model)[1])
  assert {x.dtype.name for x in flat.values()} == {'float32'}
  lora.merge(model)


@pytest.mark.parametrize(
  ('part', 'kind', 'word'),
  [
    (
      'student',
      'int4',
      r"config\.student\.quantize='int4': .* one of int8, nf4",
    ),
    ('teacher', 'nf8', r"config\.teacher\.quantize='nf8': .* one of int8, nf4"),
    ('student', 'nf4', r'set config\.student\.lora'),
  ],
)
def test_a_quantized_model_that_cannot_be_is_refused(
  config, part, kind, word, tmp_path
):
  config[part].quantize = kind
  if kind == 'nf4':
    config.student.lora = None
  with pytest.raises(UserError, match=word):
    train.run(config, tmp_path / 'run')
