"""Writers in a run: which rows they write, with which numbers, and where."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from gakd_jax import (
  UserError,
  keys,
  objectives,
  rollout,
  sampling,
  sharding,
  speculative,
  writing,
)
from gakd_jax.data import pipeline
from gakd_jax.models import decoding, lora, pair, transformer
from gakd_jax.sampler import Sampler

B, V = 8, 32
EOS = (5, 8, 9)
PAD = 5  # An EOS that ends a response is trained on, though it is the pad.
ENDS = rollout.Ends(eos_ids=EOS, pad_id=PAD, vocab=V - 2)
ROOM = 6
KEY = jax.random.key(3)


def config_of(**shape):
  return transformer.DecoderConfig(
    **{
      'vocab_size': V,
      'width': 32,
      'layers': 1,
      'heads': 4,
      'kv_heads': 2,
      'head_dim': 8,
      'ff_width': 48,
      'tied_head': True,
      'rope_theta': 1e4,
      'norm_eps': 1e-6,
      'max_length': 64,
    }
    | shape
  )


@functools.cache
def models_of(mesh=None):
  """Student and teacher of a run, and the parameters of the student."""
  both = []
  for seed, width in enumerate((32, 48)):
    model = transformer.Decoder(config_of(width=width), nnx.Rngs(seed))
    model.final_norm.scale[...] *= 2.0  # Logits that spread over some nats.
    if mesh:
      definition, params = transformer.split(model)
      params = jax.device_put(params, sharding.shardings(params, mesh))
      model = nnx.merge(definition, params)
    both.append(model)
  return pair.make(*both, dtype='float32')


def make(writer, **settings):
  made = rollout.make(writer, **{'max_new_tokens': ROOM} | settings)
  return dataclasses.replace(made, ends=ENDS)


STUDENT = make('student', share=0.6, top_p=0.95)
SPECULATIVE = make(
  'speculative', k=6, gamma=3, temperature=0.9, teacher_temperature=0.8
)


@functools.cache
def example(row):
  """(prompt, response) of the data; no two rows are alike."""
  rng = np.random.default_rng(row)
  prompt = rng.integers(10, V - 2, 1 + row % 7, np.int32)
  return prompt, rng.integers(10, V - 2, 1 + row % 5, np.int32)


def batch_of(rows, length=10):
  """Rows of the data as a `Batch` that has room; None is no row."""
  bins = [[] if row is None else [example(row)] for row in rows]
  tokens = pipeline.collate(bins, length + ROOM, PAD)
  rows_B = np.array([-1 if row is None else row for row in rows], np.int32)
  return pipeline.Batch(tokens, tokens, rows_B=rows_B)


ROWS = (0, 1, 2, 3, 4, 5, 6, None)


def write(writer, *group, mesh=None, both=None, step=1, progress=0.0):
  """[(host batch, metrics)] of a writer, for a group of batches."""
  mesh = mesh or sharding.make_mesh(data=1)
  models, params = both or models_of(mesh)
  with jax.set_mesh(mesh):
    written = writer.write(
      models, params, list(group), mesh, key=KEY, step=step, progress=progress
    )
  return jax.device_get(written)


def texts(batch):
  """{row: its ids, prompt and response}."""
  n_B = np.sum(batch.student.segments_BT > 0, axis=1)
  return {
    row: batch.student.ids_BT[b, : n_B[b]].tolist()
    for b, row in enumerate(batch.rows_B.tolist())
    if row >= 0
  }


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


WRITERS = pytest.mark.parametrize(
  'writer', [STUDENT, SPECULATIVE], ids=['student', 'speculative']
)


def decoded(writer, rows, step):
  """Responses to rows of the data, by the functions that decode."""
  models, params = models_of()
  prompts = [example(row)[0] for row in rows]
  length_B = np.array([len(prompt) for prompt in prompts])
  prompt_BT = np.zeros((len(rows), 10), np.int32)
  for b, prompt in enumerate(prompts):
    prompt_BT[b, : len(prompt)] = prompt
  step_key = jax.random.fold_in(KEY, step)
  key_B = jnp.stack([jax.random.fold_in(step_key, row) for row in rows])
  both = map(decoding.unstack, (models.student(params), models.teacher()))
  if writer is STUDENT:
    decode = functools.partial(
      sampling.decode_batch,
      next(both),
      sampler=Sampler(top_p=0.95, valid_vocab=ENDS.vocab),
      max_new_tokens=ROOM,
      eos_ids=EOS,
    )
  else:
    settings = speculative.Drafting(
      student=Sampler(0.9, valid_vocab=ENDS.vocab),
      teacher=Sampler(0.8, valid_vocab=ENDS.vocab),
      rule=speculative.Rank(6),
      gamma=3,
      max_new_tokens=ROOM,
      eos_ids=EOS,
    )
    decode = functools.partial(
      speculative.decode_batch, [*both], settings=settings
    )
  ids_BS, end_B = jax.jit(decode)(prompt_BT, length_B, key_B)[:2]
  return [
    ids[n:end] for ids, n, end in zip(ids_BS, length_B, end_B, strict=True)
  ]


@WRITERS
def test_responses_stand_where_those_of_the_data_stood(writer):
  """As they are drawn, with the row's own key; metrics are of them alone."""
  given = batch_of(ROWS)
  [(batch, metrics)] = write(writer, given, step=13)
  rows = ROWS[:-1]
  responses = [
    theirs if is_written else example(row)[1]
    for row, theirs, is_written in zip(
      rows, decoded(writer, rows, 13), batch.written_B, strict=False
    )
  ]
  bins = [
    [(example(row)[0], response)]
    for row, response in zip(rows, responses, strict=True)
  ]
  assert_same(batch.student, pipeline.collate([*bins, []], 10 + ROOM, PAD))
  assert_same(batch.teacher, batch.student)
  np.testing.assert_array_equal(batch.rows_B, given.rows_B)
  n = np.sum(batch.written_B)
  assert not batch.written_B[-1]
  assert 2 < n < 7 if writer.share < 1 else n == 7
  written = [
    response.tolist()
    for response, x in zip(responses, batch.written_B, strict=False)
    if x
  ]
  lengths = [len(response) for response in written]
  ended = [response[-1] in EOS for response in written]
  assert 0 < sum(ended) < n, 'some end, and some are cut off'
  grams = [[*zip(*(r[i:] for i in range(4)), strict=False)] for r in written]
  again = sum(len(g) - len(set(g)) for g in grams)
  want = {
    'written': n / B,
    'tokens': np.mean(lengths),
    'unfinished': 1 - np.mean(ended),
    'empty': np.mean([len(r) == 1 and r[0] in EOS for r in written]),
    'repetition': again / sum(map(len, grams)),
  }
  assert want['empty'] > 0
  assert want['repetition'] > 0
  for name, value in want.items():
    assert metrics[f'rollout/{name}'] == pytest.approx(value), name


@WRITERS
def test_a_row_does_not_depend_on_what_is_beside_it(writer):
  """On order, number and length of the others: its text, and who writes it."""
  [(want, _)] = write(writer, batch_of(ROWS))
  rows = (12, 2, 0, None, 6, 9, 10, 11)
  [(got, _)] = write(writer, batch_of(rows, 14))
  want_texts, got_texts = texts(want), texts(got)
  was_written = dict(zip(want.rows_B, want.written_B, strict=True))
  for b in (1, 2, 4):
    assert got_texts[rows[b]] == want_texts[rows[b]]
    assert got.written_B[b] == was_written[rows[b]]
  [(another, _)] = write(writer, batch_of(ROWS), step=2)
  assert texts(another) != want_texts


SEVERAL = dataclasses.replace(STUDENT, share=1.0, samples=3, beside=True)


def test_a_prompt_has_several_responses_and_that_of_the_data_beside_them():
  given = batch_of(ROWS)
  [(batch, metrics)] = write(SEVERAL, given)
  assert batch.group == 4
  np.testing.assert_array_equal(batch.rows_B, np.repeat(given.rows_B, 4))
  is_written_Bn = batch.written_B.reshape(B, 4)
  assert is_written_Bn[:-1, :3].all()
  assert not is_written_Bn[:, 3].any()
  assert not is_written_Bn[-1].any()
  assert metrics['rollout/written'] == pytest.approx(21 / 32)
  of_data = jax.tree.map(lambda x: x[3::4], batch.student)
  assert_same(of_data, given.student)
  different = 0
  for b, row in enumerate(ROWS[:-1]):
    ids = batch.student.ids_BT[4 * b : 4 * b + 3]
    prompt = example(row)[0]
    assert (ids[:, : len(prompt)] == prompt).all()
    different += len({tuple(x) for x in ids.tolist()})
  assert different > 14
  # What a row is does not depend on the others, nor on how many there are.
  fewer = dataclasses.replace(SEVERAL, samples=2, beside=False)
  [(pairs, _)] = write(fewer, batch_of((5, 1)))
  np.testing.assert_array_equal(
    pairs.student.ids_BT, batch.student.ids_BT[[20, 21, 4, 5]]
  )


def test_a_row_that_a_step_has_twice_gets_other_answers():
  fewer = dataclasses.replace(SEVERAL, samples=2, beside=False)
  [(once, _)] = write(fewer, batch_of((5, 1)))
  [(batch, _)] = write(fewer, batch_of((5, 5, 1, 5)))
  ids = batch.student.ids_BT.tolist()
  np.testing.assert_array_equal(once.student.ids_BT, [*ids[:2], *ids[4:6]])
  assert len({tuple(ids[i]) for i in (0, 1, 2, 3, 6, 7)}) > 4


@pytest.mark.slow
def test_groups_are_written_ahead_and_on_devices_of_their_own():
  group = [batch_of(ROWS), batch_of((9, 10, 11, 12, 0, 1, 2, 3), 14)]
  ahead = dataclasses.replace(SEVERAL, every=2)
  got = write(ahead, *group, step=2)
  want = [write(SEVERAL, b, step=2 + i)[0][0] for i, b in enumerate(group)]
  assert_same([batch for batch, _ in got], want)
  mesh = sharding.make_mesh(data=4)
  [(spread, _)] = write(SEVERAL, group[0], mesh=mesh, step=2)
  assert_same(spread, want[0])


def test_what_is_kept_of_a_teacher_is_interleaved_with_its_rows():
  group = [batch_of(ROWS), batch_of(ROWS, 14)]
  lengths = [batch.student.ids_BT.shape[1] for batch in group]
  group = [
    batch.replace(known={'ids': np.full((B, T, 3), i, np.int32)})
    for i, (batch, T) in enumerate(zip(group, lengths, strict=True))
  ]
  ids = writing.interleaved(group, max(lengths)).known['ids']
  assert ids.shape == (2 * B, max(lengths), 3)
  np.testing.assert_array_equal(ids[:, 0, 0], [0, 1] * B)


def test_a_share_of_the_rows_is_written():
  n = [
    np.sum(write(STUDENT, batch_of(ROWS), step=step)[0][0].written_B)
    for step in range(1, 31)
  ]
  assert len(set(n)) > 2
  assert abs(np.mean(n) / 7 - 0.6) < 3 * (0.6 * 0.4 / 210) ** 0.5


@pytest.mark.slow
@WRITERS
def test_a_student_that_does_not_move_writes_the_same_steps_ahead(writer):
  group = [
    batch_of(ROWS),
    batch_of((9, 10, 11, 12, 0, 1, 2, 3), 14),
    batch_of((4, 5, 6, None, 9, 10, 11, 12)),
  ]
  ahead = dataclasses.replace(writer, every=3)
  got = write(ahead, *group, step=2)
  want = [write(writer, b, step=2 + i)[0] for i, b in enumerate(group)]
  assert_same([batch for batch, _ in got], [batch for batch, _ in want])
  assert [bool(metrics) for _, metrics in got] == [True, False, False]
  tokens = [metrics['rollout/tokens'] for _, metrics in want]
  assert min(tokens) <= got[0][1]['rollout/tokens'] <= max(tokens)


MESHES = ({'data': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2})


@pytest.mark.parametrize(
  ('writer', 'axes'),
  [
    (STUDENT, MESHES[0]),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (SPECULATIVE, MESHES[1]),
        (STUDENT, MESHES[1]),
        (SPECULATIVE, MESHES[0]),
      )
    ),
  ],
  ids=['student-8', 'speculative-2-2-2', 'student-2-2-2', 'speculative-8'],
)
def test_eight_devices_write_what_one_writes(writer, axes):
  got = write(writer, batch_of(ROWS), mesh=sharding.make_mesh(**axes))
  want = write(writer, batch_of(ROWS))
  assert_same(got[0][0], want[0][0])
  for name, value in want[0][1].items():
    np.testing.assert_allclose(got[0][1][name], value, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_window_of_a_run_is_written_by_few_programs(caplog):
  """The data writes outside; inside, one for each length of prompts."""
  writer = dataclasses.replace(STUDENT, share=1.0, begin=0.25, end=0.5)
  with jax.log_compiles():
    for step, (length, progress, is_inside) in enumerate(
      [
        (10, 0, False),
        (10, 0.24, False),
        (10, 0.25, True),
        (14, 0.3, True),
        (10, 0.49, True),
        (14, 0.49, True),
        (10, 0.5, False),
      ]
    ):
      rows = tuple((step + row) % 13 for row in range(B))
      given = batch_of(rows, length)
      [(got, metrics)] = write(writer, given, step=step, progress=progress)
      assert bool(metrics) == is_inside
      if is_inside:
        assert got.written_B.all()
        assert texts(got) != texts(given)
      else:
        assert_same(got, given.replace(written_B=np.zeros(B, bool)))
  found = [r for r in caplog.records if 'Compiling jit(write)' in r.message]
  assert len(found) == 2


@pytest.mark.slow
def test_adapters_write_what_the_merged_student_writes():
  (models, params), given = models_of(), batch_of(ROWS)
  student = models.student(params)
  lora.attach(student, lora.LoRAConfig(rank=2, targets='query|down'), seed=0)
  for adapter in lora.adapters(student).values():
    adapter.b[...] = jax.random.normal(jax.random.key(1), adapter.b.shape)
  adapted = pair.make(student, models.teacher(), dtype='float32')
  assert 0 < len(jax.tree.leaves(adapted[1])) < len(jax.tree.leaves(params))
  lora.merge(student)
  merged = pair.make(student, models.teacher(), dtype='float32')
  got = write(STUDENT, given, both=adapted)
  assert_same(got, write(STUDENT, given, both=merged))
  assert texts(got[0][0]) != texts(write(STUDENT, given)[0][0])


def test_draws_for_different_ends_have_different_keys():
  """Of one row; response token i of the student has the key i."""
  own = {keys.SHARE, keys.TEACHER, keys.ACCEPTANCE}
  assert len(own) == 3
  assert min(own) >= 2**31


@pytest.mark.slow
@pytest.mark.parametrize(
  'writer', [STUDENT, SPECULATIVE], ids=['student', 'speculative']
)
def test_a_rollout_holds_no_text_of_logits_and_one_copy_of_the_models(writer):
  """Layers that are taken apart, once, whatever the number of tokens."""
  V, D, T = 1024, 256, 40
  config = config_of(width=D, ff_width=2 * D, layers=3, vocab_size=V)
  both = [transformer.Decoder(config, nnx.Rngs(i)) for i in (0, 1)]
  models, params = pair.make(*both, dtype='float32')
  tokens = pipeline.collate([[]] * B, T + ROOM, PAD)
  rows_B = np.zeros(B, np.int32)
  compiled = writing.write.lower(
    writer, models, params, tokens, rows_B, rows_B.astype(np.uint32), KEY
  ).compile()
  dims = re.findall(r'\b(?:f32|s32|u32|pred)\[([\d,]+)\]', compiled.as_text())
  shapes = {tuple(map(int, d.split(','))) for d in dims}
  with_vocabulary = [shape for shape in shapes if V in shape]
  assert (B, V) in with_vocabulary
  assert max(map(math.prod, with_vocabulary)) == V * D < B * T * V
  memory = compiled.memory_analysis()
  read = 4 * sum(x.size for x in jax.tree.leaves(params))
  if writer.needs_teacher:
    read *= 2
  assert read < memory.argument_size_in_bytes < 1.01 * read
  assert memory.temp_size_in_bytes < 1.35 * read


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    (
      {'writer': 'studnet'},
      ["writer='studnet': did you mean 'student'?", 'student, speculative'],
    ),
    ({'writer': 'student', 'gamma': 3}, ["'student' has no setting 'gamma'"]),
    (
      {'writer': 'student', 'max_token': 3},
      ["no setting 'max_token'", "did you mean 'max_new_tokens'?", 'share'],
    ),
    ({'writer': 'student', 'ends': None}, ["no setting 'ends'"]),
    ({'writer': 'dataset', 'share': 1}, ["no setting 'share'", 'none']),
    ({'writer': 'student', 'share': 1.5}, ['share=1.5', '0 to 1']),
    ({'writer': 'student', 'share': float('nan')}, ['share=nan']),
    ({'writer': 'student', 'begin': -0.1}, ['begin=-0.1', '0 to 1']),
    ({'writer': 'student', 'end': 2}, ['end=2', '0 to 1']),
    (
      {'writer': 'student', 'begin': 0.5, 'end': 0.5},
      ['begin=0.5', 'end=0.5', 'raise end'],
    ),
    ({'writer': 'student', 'every': 0}, ['every=0', '1 or more']),
    ({'writer': 'student', 'prefix': 0}, ['prefix=0', '1 or more']),
    ({'writer': 'student', 'max_new_tokens': 0}, ['max_new_tokens=0']),
    ({'writer': 'student', 'temperature': -1}, ['temperature=-1']),
    ({'writer': 'student', 'top_p': 2}, ['top_p=2']),
    (
      {'writer': 'student', 'samples': 2, 'temperature': 0},
      ['samples=2', 'the same'],
    ),
    ({'writer': 'speculative', 'gamma': 0}, ['gamma=0', '1 or more']),
    ({'writer': 'speculative', 'k': 0}, ['k=0', '1 or more']),
    ({'writer': 'speculative', 'alpha': 2}, ['alpha=2', '0 to 1']),
    ({'writer': 'speculative', 'g': -1}, ['g=-1', '0 to 1']),
    ({'writer': 'speculative', 'accept': 'top'}, ["accept='top'", 'mixture']),
    (
      {'writer': 'speculative', 'teacher_temperature': -1},
      ['temperature=-1'],
    ),
    *(
      (
        {'writer': 'speculative', 'accept': 'mixture', name: 0},
        ['teacher_temperature=0', 'teacher_top_k=1'],
      )
      for name in ('temperature', 'teacher_temperature')
    ),
  ],
  ids=str,
)
def test_bad_settings_are_one_line(settings, words):
  with pytest.raises(UserError) as error:
    rollout.make(**settings)
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'data.packing': True}, ['config.data.packing', 'False']),
    (
      {'data.max_length': 300},
      ['max_new_tokens: 64', 'max_prompt_length=256', 'max_length=300'],
    ),
    ({'objective.name': 'sft'}, ['sft', "writer='dataset'"]),
    (
      {'objective.name': 'sft', 'rollout.writer': 'speculative'},
      ['sft', "writer='dataset'"],
    ),
    (
      {'objective.name': 'distillm2', 'rollout.writer': 'speculative'},
      ['distillm2', "writer='student'"],
    ),
    ({'objective.name': 'distillm2'}, ['rollout.share=1', 'lower it']),
    (
      {'rollout.writer': 'teacher', 'data.turns': 'all'},
      ["config.data.turns='all'", "set it to 'last'"],
    ),
    (
      {'rollout.writer': 'teacher', 'data.weights': (1.0, 2.0)},
      ['config.data.weights', 'leave them out'],
    ),
  ],
  ids=str,
)
def test_what_does_not_fit_together_is_refused(changes, words):
  def check(changes):
    c = base.get_config()
    c.objective = {'name': 'kld'}
    c.rollout = {'writer': 'student', 'max_new_tokens': 64}
    c.update_from_flattened_dict(changes)
    objectives.make(**c.objective).check(c)
    rollout.make(**c.rollout).check(c)

  check({})
  check({'data.max_length': 256 + 64})
  with pytest.raises(UserError) as error:
    check(changes)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize(
  'writer', ['student', pytest.param('speculative', marks=pytest.mark.slow)]
)
def test_keys_and_values_are_in_int8_if_asked(writer):
  models, params = models_of()
  batch = batch_of(ROWS)

  def layers(**settings):
    lowered = make(writer, **settings).lower(models, params, batch)
    return len(set(re.findall(r'tensor<8x2x8x\d+xi8>', lowered.as_text())))

  assert not layers()
  assert layers(cache='int8')
