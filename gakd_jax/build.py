"""From a config to the parts of a run: data, models, objective, optimizer.

Everything that can be wrong is checked before any weight is loaded.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax import (
  UserError,
  inputs,
  models,
  objectives,
  optim,
  rollout,
  sharding,
  step,
)
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import evaluator
from gakd_jax.models import lora, quantized, transformer


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run is made of: all that does not change from step to step."""

  config: Any
  mesh: jax.sharding.Mesh
  objective: objectives.base.Objective
  student: Any  # model definition
  teacher: Any  # model definition, or None
  shapes: tuple  # the `DecoderConfig` of student and teacher (None)
  frozen: dict  # parameters that are not trained: 'teacher', 'student'
  # Of a run that is only planned, there are none of these.
  workdir: Path | None = None
  tokenizer: Any = None
  evaluators: dict = dataclasses.field(default_factory=dict)
  examples: list | None = None  # None: the teacher writes them first

  def whole(self, params):
    """The student's parameters, of those that are trained."""
    return lora.combine(params, self.frozen.get('student'))

  @property
  def subject(self):
    """The run as its evaluators see it."""
    c = self.config
    return evaluator.Subject(
      student=self.student,
      teacher=self.teacher,
      frozen=self.frozen,
      tokenizer=self.tokenizer,
      template=c.data.template,
      max_length=c.data.max_length,
      max_prompt_length=c.data.max_prompt_length,
      dtype=jnp.dtype(c.train.precision),
      head_chunk=c.train.head_chunk,
      mesh=self.mesh,
      workdir=self.workdir,
    )


def build(config, workdir, mesh):
  """A `Run` and the student's first parameters, in fp32."""
  objective = _checked_objective(config, mesh)
  tokenizer = tokenizer_lib.load(models.tokenizer_dir(config.student.path))
  _check_vocabulary(config.student.path, tokenizer, config.student.shape)
  for path in filter(None, (config.student.path, config.teacher.path)):
    _check_positions(path, config.data.max_length)
  if config.teacher.path:
    tokenizer_lib.check_same(
      tokenizer,
      tokenizer_lib.load(models.tokenizer_dir(config.teacher.path)),
      config.student.path,
      config.teacher.path,
    )
    _check_vocabulary(config.teacher.path, tokenizer, None)
  evaluators = evaluator.make(config.evals, config.data.validation)

  best = config.checkpoint.best_metric
  if best is not None and best.partition('/')[0] not in evaluators:
    raise UserError(
      f'config.checkpoint.best_metric={best!r} names no evaluator; they are '
      f'{", ".join(evaluators) or "none"}, and a metric is <evaluator>/<name>'
    )

  examples = None
  if config.rollout.writer == 'dataset' and config.train.steps != 0:
    examples = inputs.examples(config, config.data.train, tokenizer)

  def load(part, dtype):
    shape = part.get('shape')
    if shape is None:
      model = models.load(
        part.path, dtype=dtype, mesh=mesh, quantize=part.quantize
      )
    else:
      model = models.init(
        part.path,
        config.seed,
        dtype=dtype,
        mesh=mesh,
        quantize=part.quantize,
        **shape,
      )
    if part is config.student:
      return _with_adapters(model, config, mesh)
    return model

  return _assemble(
    config,
    mesh,
    objective,
    load,
    workdir=workdir,
    tokenizer=tokenizer,
    evaluators=evaluators,
    examples=examples,
  )


def abstract(config, mesh):
  """`build` with shapes for parameters, to plan a run with.

  Of the models, config.json is read and nothing else; there is no data.
  """
  objective = _checked_objective(config, mesh)

  def shapes(part, dtype):
    shape = models.read_config(part.path, **(part.get('shape') or {}))
    settings = part.get('lora')
    adapters = None if settings is None else lora.make_config(settings)
    definition, params = transformer.split(
      models.abstract(shape, '', adapters, part.quantize)
    )
    params = jax.eval_shape(lambda p: transformer.cast(p, dtype), params)
    return nnx.merge(definition, sharding.abstract(params, mesh))

  return _assemble(config, mesh, objective, shapes)


def _checked_objective(config, mesh):
  """The objective; refuses what is wrong whatever the models and the data."""
  objective = objectives.make(
    head_chunk=config.train.head_chunk,
    critic=config.critic.to_dict(),
    **config.objective,
  )
  rollout.check(**config.rollout)
  if config.student.lora is not None:
    lora.make_config(config.student.lora)
  for name in ('student', 'teacher'):
    quantized.check(config[name].quantize, f'config.{name}.quantize')
  if config.student.quantize is not None and config.student.lora is None:
    raise UserError(
      f'config.student.quantize={config.student.quantize!r} is for a base that '
      'is not trained; set config.student.lora, or quantize to None'
    )
  if config.train.steps is None and config.train.epochs is None:
    raise UserError('config.train: set steps or epochs')
  microbatch = config.train.microbatch_size or config.train.batch_size
  sharding.check_batch_size(config.train.batch_size, microbatch, mesh)
  if objective.whole_rows and config.data.packing:
    raise UserError(
      'config.data.packing: this objective reads rows whole, one document '
      'each; set it to False'
    )
  for settings in (config.optimizer, config.critic_optimizer):
    optimizer(settings, 1)
  uses_teacher = objective.needs_teacher or config.rollout.writer == 'teacher'
  if uses_teacher and config.teacher.path is None:
    raise UserError(
      'config.teacher.path is not set, and this config needs a teacher'
    )
  return objective


def _assemble(config, mesh, objective, load, **rest):
  """A `Run` of models that `load(part of the config, dtype)` gives."""
  # All weights are trained in fp32; a frozen base keeps its own dtype.
  trains_all = config.student.lora is None
  dtype = 'float32' if trains_all else config.student.dtype
  student, teacher = load(config.student, dtype), None
  if config.teacher.path:
    teacher = load(config.teacher, config.teacher.dtype)
  shapes = student.config, teacher and teacher.config
  student, student_params = transformer.split(student)
  frozen = {}
  if config.student.lora is not None:
    student_params, frozen['student'] = lora.partition(student_params)
  if teacher is not None:
    teacher, frozen['teacher'] = transformer.split(teacher)
  this = Run(
    config=config,
    mesh=mesh,
    objective=objective,
    student=student,
    teacher=teacher,
    shapes=shapes,
    frozen=frozen,
    **rest,
  )
  return this, student_params


def _with_adapters(model, config, mesh):
  """The student as it starts: with adapters if `config.student.lora` says so.

  Those of an adapter's directory go on, if they are what the config asks for;
  without `lora` they are merged, and all weights are trained.
  """
  settings = config.student.lora
  if settings is None:
    lora.merge(model)
  elif lora.adapters(model):
    lora.resume(model, lora.make_config(settings), config.student.path)
  else:
    place = sharding.replicated(mesh)
    lora.attach(model, lora.make_config(settings), config.seed, place)
  return model


def _check_vocabulary(path, tokenizer, shape):
  rows = (shape or {}).get('vocab_size') or models.read_config(path).vocab_size
  if len(tokenizer) > rows:
    raise UserError(
      f'{path}: the tokenizer has {len(tokenizer)} tokens but the model only '
      f'{rows} embedding rows; use the tokenizer that belongs to the model'
    )


def _check_positions(path, max_length):
  config = models.read_config(path)
  if config.learned_positions and max_length > config.max_length:
    raise UserError(
      f'config.data.max_length={max_length}, and {path} has learned only '
      f'{config.max_length} positions; lower it'
    )


def optimizer(config, total_steps):
  """The optax chain of an optimizer's config, and its schedule."""
  settings = config.to_dict()
  schedule = optim.make_schedule(
    settings.pop('learning_rate'),
    total_steps,
    schedule=settings.pop('schedule'),
    warmup_steps=settings.pop('warmup_steps'),
    end=settings.pop('end'),
  )
  return optim.make(schedule, **settings), schedule


def make_train_step(this, student_params, steps_per_epoch, total):
  """The jitted step of a run, and how its state comes about.

  Nothing is allocated, and `student_params` may be shapes.

  Returns:
    train_step: see `step.make_train_step`.
    make: (student's parameters, extra, critic) -> `TrainState`.
    state: what `make` makes, as shapes with their places on the mesh.
  """
  c = this.config
  main, schedule = optimizer(c.optimizer, total)
  critic_optimizer, _ = optimizer(c.critic_optimizer, total)

  def make(student_params, extra, critic):
    return step.init_state(
      student_params,
      main,
      extra=extra,
      critic=critic,
      critic_optimizer=critic_optimizer,
    )

  extra, critic = this.objective.shapes(*this.shapes)
  state = jax.eval_shape(make, student_params, extra, critic)
  train_step = step.make_train_step(
    step.Models(
      this.student,
      this.teacher if this.objective.needs_teacher else None,
      jnp.dtype(c.train.precision),
      c.student.remat,
    ),
    this.objective.for_run(steps_per_epoch, total),
    main,
    schedule,
    critic_optimizer=critic_optimizer,
    seed=c.seed,
    microbatches=microbatches(c),
    out_shardings=step.state_shardings(state, this.mesh),
  )
  return train_step, make, sharding.abstract(state, this.mesh)


def microbatches(config):
  """How many of them make an optimizer step."""
  c = config.train
  return c.batch_size // (c.microbatch_size or c.batch_size)


def first_state(this, student_params, make, state):
  """The state at step 0. Consumes the student's parameters.

  `make` and `state` are those of `make_train_step`.
  """
  extra, critic = this.objective.init(
    jax.random.key(this.config.seed), *this.shapes, this.mesh
  )
  places = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(make, out_shardings=places, donate_argnums=(0, 1, 2))(
    student_params, extra, critic
  )
