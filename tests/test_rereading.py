"""What a student writes is read by its teacher as if it were data."""

import json

import jax
import numpy as np
import pytest

from gakd_jax import rereading, sharding
from gakd_jax.data import aligned, pipeline, sources, texts
from gakd_jax.data import tokenizer as tokenizer_lib

KINDS = ('pairs', 'span', 'dtw', 'path')
ROWS = [
  {'prompt': 'the other', 'response': 'there, then the teacher 你好'},
  {'prompt': 'x', 'response': 'the'},
  {'prompt': 'what follows', 'response': 'a b c ' * 9},
  {'prompt': 'y', 'response': 'sober <|im_end|> and the 😀 of it'},
]
OTHERS = [row | {'response': row['response'][::-1]} for row in ROWS]
LENGTH = 64


@pytest.fixture
def readers(tiny_tokenizer_dir, pieces_tokenizer_dir):
  return tuple(
    (tokenizer_lib.load(path), 'raw')
    for path in (tiny_tokenizer_dir, pieces_tokenizer_dir)
  )


@pytest.fixture
def batch_of(readers, tmp_path):
  def batch_of(rows):
    """A batch of the data: all rows, in order."""
    file = tmp_path / 'rows.jsonl'
    file.write_text('\n'.join(map(json.dumps, rows)))
    read = [
      texts.load(
        str(file),
        sources.identity(file),
        tokenizer,
        template=template,
        rules=sources.Rules(),
        thinking='refuse',
        root=tmp_path / 'cache',
      )[0]
      for tokenizer, template in readers
    ]
    both = aligned.load(
      *read, [tokenizer for tokenizer, _ in readers], KINDS, tmp_path / 'cache'
    )
    batches = pipeline.batches(
      both.fit(LENGTH, 32)[0],
      batch_size=len(rows),
      max_length=LENGTH,
      pad_id=[tokenizer_lib.pad_id(tokenizer) for tokenizer, _ in readers],
      buckets=(LENGTH,),
    )
    return next(batches)

  return batch_of


def read(readers, given, student, written):
  """`given` where the student of another batch has written some of the rows."""
  mesh = sharding.make_mesh(2, 2, 2)
  new = given.replace(
    student=jax.tree.map(
      lambda a, b: np.where(written[:, None], a, b), student, given.student
    ),
    written_B=written,
  )
  reader = rereading.Reader(readers, KINDS)
  found, metrics = reader.read(
    given, sharding.put_batch(new, mesh), {'rollout/tokens': 1.0}, mesh
  )
  assert metrics['rollout/tokens'] == 1
  return jax.tree.map(sharding.local_rows, found), metrics


def equal(found, expected, rows):
  for name in ('student', 'teacher', 'align'):
    pair = getattr(found, name), getattr(expected, name)
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
      np.testing.assert_array_equal(a[rows], b[rows], name)


def test_written_text_is_read_as_data_is(batch_of, readers):
  given, other = batch_of(ROWS), batch_of(OTHERS)
  assert set(given.align) == {
    'pairs_t', 'dtw_t', 'span_s', 'span_t', 'path_s', 'path_t', 'path_d',
  }  # fmt: skip
  written = np.array([True, False, True, True])
  found, metrics = read(readers, given, other.student, written)
  equal(found, other, written)
  equal(found, given, ~written)
  assert (found.written_B == written).all()
  assert 0 < metrics['coverage/pairs_t'] < metrics['coverage/span_s'] < 1
  assert metrics.keys() == {
    'rollout/tokens',
    *(f'coverage/{x}' for x in ('pairs_t', 'dtw_t', 'span_s', 'span_t')),
  }


def with_responses(batch, tokens):
  """Its rows with the student's responses replaced by other tokens."""
  bins = []
  for b, response in enumerate(tokens):
    ids, mask = batch.student.ids_BT[b], batch.student.mask_BT[b]
    prompt = ids[(batch.student.segments_BT[b] > 0) & ~mask]
    bins.append([(prompt, np.array(response, np.int32))])
  return pipeline.collate(bins, LENGTH, 0)


def test_what_is_no_text_has_no_partner(batch_of, readers):
  """A part of a character, an end of turn alone, and a turn without an end."""
  given = batch_of(ROWS)
  (student, _), (teacher, _) = readers
  end = student.eos_token_id
  the = student('the', add_special_tokens=False).input_ids
  part = student('你', add_special_tokens=False).input_ids[:2]
  written = with_responses(
    given, [[*part, *the, end], [end], [*the], [*the, student.pad_token_id]]
  )
  found, _ = read(readers, given, written, np.ones(4, bool))
  texts = [
    teacher.decode(ids[mask])
    for ids, mask in zip(
      found.teacher.ids_BT, found.teacher.mask_BT, strict=True
    )
  ]
  assert [x.replace(' ', '') for x in texts] == [
    'the</s>',
    '</s>',
    'the',
    'the',
  ]
  # What the part of a character stands before is of one piece with it.
  for b, n in enumerate([2 + len(the), 0, 0, 0]):
    at = np.flatnonzero(found.student.mask_BT[b])
    assert (found.align['span_s'][b][at[:n]] == -1).all()
    assert found.align['span_s'][b][at[n]] >= 0


def test_what_is_longer_in_the_teachers_tokens_is_cut(batch_of, readers):
  given = batch_of(ROWS)
  (student, _), (teacher, _) = readers
  word = max(student.get_vocab(), key=lambda x: len(x) * ('<' not in x))
  n = len(teacher(word.replace('Ġ', ' '), add_special_tokens=False).input_ids)
  assert n > 2
  many = [student.get_vocab()[word]] * (LENGTH // 2)
  written = with_responses(given, [many] * 4)
  found, _ = read(readers, given, written, np.ones(4, bool))
  assert found.teacher.segments_BT.all()
  lost = found.align['span_s'][found.student.mask_BT] == -1
  assert 0 < lost.mean() < 1
