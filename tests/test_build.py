"""The parts of a run: what they know before weights are read, and refuse."""

import dataclasses

import pytest

from configs import base
from gakd_jax import UserError, build, models, sharding, training
from gakd_jax.evals import generation, loss
from gakd_jax.models import lora, transformer


@pytest.fixture
def config(tiny_model_dir):
  c = base.get_config()
  c.student.path = c.teacher.path = str(tiny_model_dir())
  c.objective = {'name': 'kld'}
  c.train.steps, c.train.batch_size = 3, 8
  c.mesh.data = 1
  return c


def run_of(config):
  return build.abstract(config, sharding.make_mesh(**config.mesh))


@pytest.mark.parametrize('shape', [None, {'layers': 1, 'width': 16}])
@pytest.mark.parametrize('adapters', [False, True])
def test_a_student_is_known_before_its_weights_are_read(
  config, shape, adapters, tmp_path
):
  """Also one whose adapters are merged when it is loaded."""
  if adapters:
    model = models.load(config.student.path)
    lora.attach(model, lora.LoRAConfig(2, 4.0), 0)
    models.save(model, tmp_path / 'adapter')
    config.student.path = str(tmp_path / 'adapter')
  if shape and adapters:
    config.student.path = str(models.resolve_base(config.student.path))
  config.student.shape = shape
  if shape is None:
    model = models.load(config.student.path, 'float32')
    lora.merge(model)
  else:
    model = models.init(config.student.path, 0, 'float32', **shape)
  run = run_of(config)
  definition, params = transformer.split(model)
  assert run.models.student_definition == definition
  assert run.models.student_config == model.config
  shapes = {k: x.shape for k, x in flat(run.shapes)}
  assert shapes == {k: x.shape for k, x in flat(params)}


def flat(tree):
  return models.convert.flatten(tree).items()


@pytest.mark.parametrize(
  ('key', 'place'),
  [('head_chunk', 'config.train.head_chunk'), ('critic', 'config.critic')],
)
def test_settings_that_stand_elsewhere_are_refused(config, key, place):
  config.objective = {'name': 'gakd', key: 7}
  with pytest.raises(UserError, match=f'{key} is no setting; set {place}'):
    run_of(config)


def test_wrong_settings_are_refused(config):
  config.attention = 'flash'
  with pytest.raises(
    UserError, match='expected one of auto, chunked, xla, cudnn, splash'
  ):
    run_of(config)
  config.attention = 'auto'
  config.optimizer.extra_learning_rate = -1.0
  with pytest.raises(UserError, match=r'extra_learning_rate=-1\.0'):
    run_of(config)
  config.optimizer.extra_learning_rate = None
  config.objective = {'name': 'gakd', 'reference': True, 'warmup_steps': 1}
  config.data.packing = True
  with pytest.raises(UserError, match='reference=True reads rows whole'):
    run_of(config)


def test_a_teacher_of_another_tokenizer_reads_no_ids_of_the_student(config):
  run = run_of(config)
  cross = dataclasses.replace(run, readers=('student', 'teacher'))
  for kind, reads in ((loss.Loss, True), (generation.Generation, False)):
    assert kind.teacher_reads_student_ids == reads
    subjects = (x.subject_of(kind, None) for x in (run, cross))
    have = [s.models.teacher_definition is not None for s in subjects]
    assert have == [True, not reads]


def test_a_critic_of_each_microbatch_counts_its_updates(config, monkeypatch):
  asked, optimizer = [], training.optimizer

  def spy(config, total_steps, updates=1):
    asked.append(updates)
    return optimizer(config, total_steps, updates)

  monkeypatch.setattr(training, 'optimizer', spy)
  config.objective = {
    'name': 'gakd',
    'reference': True,
    'warmup_steps': 1,
    'critic_steps': 2,
  }
  config.train.batch_size, config.train.microbatch_size = 8, 2
  training.make(run_of(config), 3, 9)
  assert asked == [1, 8]
