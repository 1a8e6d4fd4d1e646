"""From a config to the parts of a run: data, models, objective, optimizer.

Everything that can be wrong is checked before any weight is loaded.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax import (
  UserError,
  fields,
  inputs,
  models,
  objectives,
  rereading,
  rollout,
  sharding,
  teacher_cache,
)
from gakd_jax import readers as readers_lib
from gakd_jax.data import aligned
from gakd_jax.data import texts as texts_lib
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import evaluator as evaluator_lib
from gakd_jax.models import cut, lora, pair, transformer
from gakd_jax.models.attention import choose_backend


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run is made of: all that does not change from step to step."""

  config: Any
  mesh: jax.sharding.Mesh
  objective: objectives.base.Objective
  writer: rollout.Dataset  # of the responses
  models: pair.Models
  start: Callable  # () -> the student's parameters at step 0, those trained
  shapes: dict  # of these
  # Of a run that is only planned, there are none of these.
  workdir: Path | None = None
  # Who has tokens of their own, (tokenizer, template): the student, and the
  # teacher if its tokens are others.
  readers: tuple = ()
  force: bool = False  # what is half written of other settings begins anew
  has_weights: bool = False  # else shapes in their place
  evaluators: dict = dataclasses.field(default_factory=dict)
  # None: the writer makes them.
  texts: texts_lib.Texts | aligned.Aligned | None = None

  @property
  def reading(self):
    """Those of `readers` that read the texts which are trained on."""
    return readers_lib.reading(self.readers, self.objective)

  @functools.cached_property
  def reader(self):
    """Who reads what is written in the run in other tokens; None: nobody."""
    if len(self.reading) == 2 and self.writer.room:
      return rereading.Reader(self.readers, self.objective.align)
    return None

  def subject_of(self, evaluator, workdir):
    """The run as an evaluator sees it; `workdir` is where answers go."""
    c = self.config
    models = self.models
    if evaluator.teacher_reads_student_ids and len(self.readers) == 2:
      models = models.alone()
    return evaluator_lib.Subject(
      models=models,
      template=c.data.template,
      thinking=c.data.thinking,
      max_length=c.data.max_length,
      max_prompt_length=c.data.max_prompt_length,
      head_chunk=self.objective.head_chunk,
      mesh=self.mesh,
      workdir=workdir,
    )


def build(config, workdir, mesh, force=False, weights=True):
  """The `Run` of a config; the student's weights are read by its `start`.

  Without `weights`, there are shapes in their place.
  """
  objective, writer = _checked(config, mesh)
  paths = [config.student.path, *filter(None, [config.teacher.path])]
  tokenizers = [
    tokenizer_lib.load(models.tokenizer_dir(path)) for path in paths
  ]
  shapes = [config.student.shape or {}, {}]
  for path, tokenizer, shape in zip(paths, tokenizers, shapes, strict=False):
    shape = models.read_config(path, **shape)
    check_readable(path, tokenizer, config.data.max_length, shape)
    choose_backend(
      config.attention, shape, config.train.precision, _platform(mesh)
    )
  teacher_cache.check_size(config, tokenizers)
  readers = readers_lib.of(config, objective, writer, tokenizers, paths)
  evaluators = evaluator_lib.make(
    config.evals,
    config.data.validation,
    lambda: [(config.data.template, tokenizers[0])],
    config.data.on_bad_row,
    config.data.thinking,
  )
  _check_choice(
    config.checkpoint,
    evaluators,
    has_teacher=len(paths) == 2 and len(readers) == 1,
  )
  writer = writer.for_tokenizer(config.data.template, tokenizers[0])
  texts = None
  if not writer.makes_rows and config.train.steps != 0:
    texts = inputs.texts(
      config,
      config.data.train,
      readers_lib.reading(readers, objective),
      writer,
      objective.align,
    )

  # Else all that is asked of it is on disk.
  teacher_reads = (
    _teacher_reads(config)
    or texts is None
    or not teacher_cache.is_whole(config, objective, texts)
  )

  def load(part, dtype):
    if not weights:
      return _shapes(part, dtype, mesh)
    settings = {'dtype': dtype, 'mesh': mesh, 'quantize': part.quantize}
    if part is config.teacher and not teacher_reads:
      if part.cache in teacher_cache.NUMBERS:
        return None
      return models.load(part.path, dtype, mesh, blocks=False)
    shape = part.get('shape')
    if part.get('keep') is not None:
      keep = cut.make(part.keep)
      some = ()
      if keep.asks_data:
        some = inputs.first_rows(config, tokenizers[0], keep.rows)
      model = models.load(part.path, **settings)
      lora.merge(model)
      return cut.cut(model, keep, some, mesh)
    if shape is None:
      return models.load(part.path, **settings)
    return models.init(part.path, config.seed, **settings, **shape)

  run = _assemble(
    config,
    mesh,
    objective,
    writer,
    load,
    tokenizers=tokenizers,
    workdir=workdir,
    readers=readers,
    force=force,
    has_weights=weights,
    evaluators=evaluators,
    texts=texts,
  )
  constants = objective.constants(run.models)
  if not constants:
    return run
  constants = jax.device_put(constants, sharding.replicated(mesh))
  frozen = run.models.frozen | {'constants': constants}
  return dataclasses.replace(
    run, models=dataclasses.replace(run.models, frozen=frozen)
  )


def abstract(config, mesh):
  """`build` with shapes for parameters, to plan a run with.

  Of the models, what `models.read_config` reads and nothing else; there is no
  data.
  """
  objective, writer = _checked(config, mesh)

  def load(part, dtype):
    reads = part is not config.teacher or _teacher_reads(config)
    if not reads and part.cache in teacher_cache.NUMBERS:
      return None
    return _shapes(part, dtype, mesh, reads)

  return _assemble(config, mesh, objective, writer, load)


def _teacher_reads(config):
  """Whether anybody asks more of a teacher than what is kept of it."""
  return config.teacher.cache == 'none' or any(
    evaluator_lib.kind_of(name, line).teacher_reads_student_ids
    for name, line in config.evals.items()
  )


def _shapes(part, dtype, mesh, blocks=True):
  """The model of `config.student` or `config.teacher`, as placed shapes."""
  definition, params = transformer.split(_abstract(part, blocks))
  params = jax.eval_shape(lambda p: transformer.cast(p, dtype), params)
  return nnx.merge(definition, sharding.abstract(params, mesh))


def _abstract(part, blocks=True):
  """The model of `config.student` or `config.teacher`, without weights."""
  shape, adapters = part.get('shape'), part.get('lora')
  config = models.read_config(part.path, **(shape or {}))
  if part.get('keep') is not None:
    config = cut.make(part.keep).shape(config)
  if not blocks:
    config = models.without_blocks(config)
  return models.abstract(
    config,
    models.resolve_base(part.path, '*config.json'),
    None if adapters is None else lora.make_config(adapters),
    part.quantize,
    models.tokenizer_dir(part.path),
  )


def _checked(config, mesh):
  """(objective, writer); refuses what is wrong whatever models and data are."""
  fields.check(config)
  if config.student.path is None:
    raise UserError('config.student.path is not set: name a model directory')
  objective = objectives.make(
    head_chunk=_head_chunk(config, mesh),
    critic=config.critic.to_dict(),
    **config.objective,
  )
  objective.check(config)
  writer = rollout.make(**config.rollout).for_objective(objective)
  writer.check(config)
  teacher_cache.check(config, objective, writer)
  if config.train.steps is None and config.train.epochs is None:
    raise UserError('config.train: set steps or epochs')
  microbatch = config.train.microbatch_size or config.train.batch_size
  sharding.check_batch_size(config.train.batch_size, microbatch, mesh)
  is_in_data = config.teacher.cache == 'data'
  needs_teacher = objective.needs_teacher and not is_in_data
  needs_teacher |= writer.needs_teacher
  if needs_teacher and config.teacher.path is None:
    raise UserError(
      'config.teacher.path is not set, and this config needs a teacher'
    )
  return objective, writer


def _head_chunk(config, mesh):
  """`head_chunk` of a run, whose models need be read only for `head_memory`."""
  shapes = []
  if config.train.head_memory is not None:
    parts = [config.student, *([config.teacher] if config.teacher.path else [])]
    shapes = [
      models.read_config(part.path, **(part.get('shape') or {}))
      for part in parts
    ]
  return head_chunk(config.train, shapes, mesh)


def head_chunk(settings, shapes, mesh):
  """Tokens whose logits exist at a time, on each device.

  settings: `config.train`. shapes: `DecoderConfig`s of all models.
  """
  if settings.head_memory is None:
    return settings.head_chunk
  ids = sum(shape.vocab_size for shape in shapes) / mesh.shape['tensor']
  return max(1, int(settings.head_memory * 1e9 / (4 * ids)))


def _assemble(config, mesh, objective, writer, load, tokenizers=(), **rest):
  """A `Run` of models that `load(part of the config, dtype)` gives."""
  if config.student.lora is None:
    # All weights are trained, in fp32. Where a state is restored, they are not
    # read.
    student = _abstract(config.student)
  else:  # A frozen base keeps its own dtype.
    student = load(config.student, config.student.dtype)
    _put_adapters(student, config, mesh)
  teacher = None
  if config.teacher.path:
    teacher = load(config.teacher, config.teacher.dtype)
  both, params = pair.make(
    student,
    teacher,
    dtype=config.train.precision,
    attention=config.attention,
    platform=_platform(mesh),
    remat=config.student.remat,
    packed=config.data.packing,
    tokenizers=tokenizers,
  )

  def start():
    if config.student.lora is not None:  # Copied: a step donates them.
      return jax.tree.map(jnp.copy, params)
    model = load(config.student, 'float32')
    lora.merge(model)
    return transformer.split(model)[1]

  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  return Run(
    config=config,
    mesh=mesh,
    objective=objective,
    writer=writer,
    models=both,
    start=start,
    shapes=shapes,
    **rest,
  )


def _platform(mesh):
  """'cpu', 'gpu' or 'tpu': of a mesh, whose devices may be elsewhere."""
  return mesh.devices.flat[0].platform


def _put_adapters(model, config, mesh):
  """Adapters as `config.student.lora` says, in place.

  Those of an adapter's directory go on, if they are what the config asks for.
  """
  settings = lora.make_config(config.student.lora)
  if lora.adapters(model):
    lora.resume(model, settings, config.student.path)
  else:
    place = sharding.replicated(mesh)
    lora.attach(model, settings, config.seed, place)


def _check_choice(config, evaluators, has_teacher):
  """Of `config.checkpoint`: what best/ is chosen by, and when it is enough."""
  evaluator_lib.check_metric(config.best_metric, evaluators, has_teacher)
  if config.patience is not None and config.best_metric is None:
    raise UserError(
      f'config.checkpoint.patience={config.patience}: it takes a '
      'config.checkpoint.best_metric, to see that it is no better'
    )


def check_readable(path, tokenizer, max_length, shape):
  """Refuses texts in ids or of a length that a model does not know."""
  largest, rows = tokenizer_lib.size(tokenizer) - 1, shape.vocab_size
  if largest >= rows:
    raise UserError(
      f"{path}: the tokenizer's largest id is {largest} but the model has only "
      f'{rows} embedding rows; use the tokenizer that belongs to the model'
    )
  if shape.learned_positions and max_length > shape.max_length:
    raise UserError(
      f'config.data.max_length={max_length}, and {path} has learned only '
      f'{shape.max_length} positions; lower it'
    )
