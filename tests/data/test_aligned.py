"""Rows in the tokens of two models, from a file to a batch."""

import json

import numpy as np
import pytest

from gakd_jax import UserError
from gakd_jax.data import align as align_lib
from gakd_jax.data import aligned, pipeline, sources, spelling, texts

ROWS = [
  {'prompt': 'the other', 'response': 'there, then the teacher 你好'},
  {'prompt': 'x', 'response': 'the'},
  {'prompt': 'a longer prompt than those', 'response': 'a b c ' * 9},
  {'prompt': 'y', 'response': 'sober and the rest 😀 of it'},
]
KINDS = ('pairs', 'span', 'dtw')
PADS = (7, 8)


@pytest.fixture
def load(kind, tmp_path):
  def load(rows=ROWS, names=('tiny', 'pieces'), kinds=KINDS):
    file = tmp_path / 'rows.jsonl'
    file.write_text('\n'.join(map(json.dumps, rows)))
    tokenizers = [kind(name).tokenizer for name in names]
    read = [
      texts.load(
        str(file),
        sources.identity(file),
        tokenizer,
        template='raw',
        rules=sources.Rules(),
        thinking='refuse',
        root=tmp_path / 'cache',
      )[0]
      for tokenizer in tokenizers
    ]
    return aligned.load(*read, tokenizers, kinds, tmp_path / 'cache')

  return load


def test_each_row_is_aligned_as_it_is_alone(load, kind):
  found = load()
  assert len(found) == len(ROWS)
  spellings = [kind(name).spelling for name in ('tiny', 'pieces')]
  for (_, s), (_, t), parts in found:
    readings = [
      spelling.read(x, ids) for x, ids in zip(spellings, (s, t), strict=True)
    ]
    pairs = align_lib.exact_pairs(*readings)
    expected = align_lib.partners(*pairs, len(s))
    np.testing.assert_array_equal(parts['pairs_t'], expected)
    for name, piece in zip(
      ('span_s', 'span_t'), align_lib.spans(*readings), strict=True
    ):
      np.testing.assert_array_equal(parts[name], piece)
    assert parts['dtw_t'].max() < len(t)
  shares = found.coverage()
  assert set(shares) == {'pairs_t', 'dtw_t', 'span_s', 'span_t'}
  # Bytes of words that are one token there have no partner.
  assert 0 < shares['pairs_t'] < shares['span_s'] == 1


def test_alignments_are_made_once(load, monkeypatch):
  first = load()
  monkeypatch.setattr(aligned, 'KINDS', {})
  with pytest.raises(KeyError):
    load(kinds=('other',))
  monkeypatch.setattr(
    aligned, 'KINDS', dict.fromkeys(KINDS, lambda *_: pytest.fail('again'))
  )
  again = load()
  assert again.digest == first.digest
  for (*_, a), (*_, b) in zip(first, again, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_what_does_not_fit_either_model_is_cut_and_left_out(load):
  every = load()
  found, cut = every.fit(24, 12)
  assert found.places.tolist() == [0, 1, 3]
  assert cut == 2
  for row, whole in zip(found, [every[0], every[1], every[3]], strict=True):
    (s_prompt, s), (t_prompt, t), parts = row
    assert len(s_prompt) + len(s) <= 24 >= len(t_prompt) + len(t)
    assert [len(parts[x]) for x in ('pairs_t', 'span_s')] == [len(s)] * 2
    assert len(parts['span_t']) == len(t)
    for name in ('pairs_t', 'dtw_t'):
      expected = whole[2][name][: len(s)]
      lost = expected >= len(t)
      np.testing.assert_array_equal(parts[name], np.where(lost, -1, expected))
    # A piece is whole on both sides, or none.
    for name, full in (
      ('span_s', whole[2]['span_s']),
      ('span_t', whole[2]['span_t']),
    ):
      for piece in set(parts[name]) - {-1}:
        assert (parts[name] == piece).sum() == (full == piece).sum()


@pytest.mark.parametrize('packing', [False, True])
def test_a_batch_has_what_relates_its_tokens(load, kind, packing):
  """Of every pair both sides spell the same, and of every piece."""
  found, _ = load().fit(64, 40)
  batches = pipeline.batches(
    found,
    batch_size=2,
    max_length=64,
    buckets=(64,),
    pad_id=PADS,
    packing=packing,
    epochs=1,
  )
  spellings = [kind(name).spelling for name in ('tiny', 'pieces')]
  rows, pairs, pieces = 0, 0, 0
  for batch in batches:
    s, t = batch.student, batch.teacher
    assert s.ids_BT.shape == t.ids_BT.shape == (2, 64)
    for b in range(2):
      assert set(s.ids_BT[b][s.segments_BT[b] == 0]) <= {PADS[0]}
      assert set(t.ids_BT[b][t.segments_BT[b] == 0]) <= {PADS[1]}
      rows += len(set(s.segments_BT[b]) - {0})
      assert s.segments_BT[b].max() == t.segments_BT[b].max()
      texts_of = [
        _texts(x, y.ids_BT[b]) for x, y in zip(spellings, (s, t), strict=True)
      ]
      for n, m in enumerate(batch.align['pairs_t'][b]):
        if m >= 0:
          assert s.segments_BT[b, n] == t.segments_BT[b, m]
          assert s.mask_BT[b, n]
          assert t.mask_BT[b, m]
          assert texts_of[0][n].lstrip() == texts_of[1][m].lstrip()
          pairs += 1
      for k in set(s.segments_BT[b]) - {0}:
        n, m = (
          np.flatnonzero(x.mask_BT[b] & (x.segments_BT[b] == k)) for x in (s, t)
        )
        (part,) = (
          parts['dtw_t']
          for (_, response), _, parts in found
          if [*response] == [*s.ids_BT[b, n]]
        )
        # By the positions that predict them.
        np.testing.assert_array_equal(
          batch.align['dtw_t'][b, n - 1],
          np.where(part >= 0, m[0] - 1 + part, -1),
        )
      spans = batch.align['span_s'][b], batch.align['span_t'][b]
      for piece in set(spans[0]) - {-1}:
        sides = [
          b''.join(texts_of[i][n] for n in np.flatnonzero(spans[i] == piece))
          for i in range(2)
        ]
        assert sides[0].strip() == sides[1].strip()
        segments = [
          set(x.segments_BT[b][y == piece])
          for x, y in zip((s, t), spans, strict=True)
        ]
        assert segments[0] == segments[1]
        assert len(segments[0]) == 1
        pieces += 1
  assert rows == len(found)
  assert pairs > 10 < pieces


def _texts(reader, ids):
  return [
    reader.bytes[reader.starts[i] :][: reader.lengths[i]].tobytes() for i in ids
  ]


def test_one_side_may_lack_a_row(load, kind, tmp_path):
  found = load()
  fewer = aligned.load(
    found.student.take(np.array([0, 2])),
    found.teacher.take(np.array([1, 2])),
    [kind(name).tokenizer for name in ('tiny', 'pieces')],
    (),
    tmp_path,
  )
  assert fewer.places.tolist() == [2]
  with pytest.raises(UserError, match='both tokenizers'):
    aligned.load(
      found.student.take(np.array([0])),
      found.teacher.take(np.array([1])),
      [kind(name).tokenizer for name in ('tiny', 'pieces')],
      (),
      tmp_path,
    )


def test_paths_are_of_whole_rows(load, kind):
  found, _ = load(kinds=('path',)).fit(40, 40)
  assert found.coverage() == {}
  (s_prompt, s), (t_prompt, t), parts = found[0]
  assert parts.keys() == {'path_s', 'path_t', 'path_d'}
  # Both texts are there from their first to their last token, in each path.
  assert parts['path_s'].max() == len(s_prompt) + len(s) - 1
  assert parts['path_t'].max() == len(t_prompt) + len(t) - 1
  assert (parts['path_s'] == 0).sum() >= 2
  for side, limits in (('path_s', (30, 40)), ('path_t', (40, 30))):
    s, t, _ = found[2]
    s, t = (
      (x, y[: n - len(x)]) for (x, y), n in zip((s, t), limits, strict=True)
    )
    cut = aligned.kept(s, t, found[2][2])[2]
    assert cut[side].max() == 29
    assert len(cut['path_s']) == len(cut['path_t']) == len(cut['path_d'])
  batch = next(
    pipeline.batches(
      found, batch_size=4, max_length=40, buckets=(40,), pad_id=PADS
    )
  )
  for name in parts:
    assert batch.align[name].shape == (4, 160)
    n = len(parts[name])
    np.testing.assert_array_equal(batch.align[name][0, :n], parts[name])
    assert (batch.align[name][0, n:] == -1).all()


def test_a_process_without_a_row_has_all_arrays(load):
  """So that what all processes put together has one structure."""
  found, _ = load().fit(64, 40)
  shares = [
    next(
      pipeline.batches(
        found.take(np.array([0])),
        batch_size=2,
        max_length=64,
        buckets=(64,),
        pad_id=PADS,
        rows=[i],
      )
    )
    for i in range(2)
  ]
  assert shares[0].align.keys() == shares[1].align.keys() != set()
  assert (shares[1].align['pairs_t'] == -1).all()
