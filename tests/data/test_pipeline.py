import collections
import functools
import itertools

import jax
import numpy as np
import pytest

from gakd_jax import UserError
from gakd_jax.data import encoding, pipeline, sources, texts
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import Row, Rules

BUCKETS = (8, 16, 32)


def lengths(n=101, seed=0):
  return np.random.default_rng(seed).integers(2, 33, n).tolist()


def some_texts(n=101):
  """Texts whose every token is 100000 + their index."""
  return texts.of(
    [
      ([100_000 + i] * (length // 2), [100_000 + i] * (length - length // 2))
      for i, length in enumerate(lengths(n))
    ]
  )


make = functools.partial(
  pipeline.batches, batch_size=4, max_length=32, pad_id=0, buckets=BUCKETS
)


def take(iterator, n):
  """The next n batches, as hashable values."""
  return [
    tuple((leaf.shape, leaf.tobytes()) for leaf in jax.tree.leaves(batch))
    for batch in itertools.islice(iterator, n)
  ]


@pytest.mark.parametrize(
  ('max_length', 'expected'),
  [
    (16, (16,)),
    (112, (56, 112)),
    (250, (64, 128, 250)),
    (512, (128, 256, 512)),
  ],
)
def test_default_buckets(max_length, expected):
  assert pipeline.default_buckets(max_length) == expected


# From texts to arrays.


def test_collate():
  tokens = pipeline.collate(
    [[([1, 2], [3, 9])], [], [([4], [5]), ([6], []), ([], [7, 8])]], 6, 9
  )
  assert tokens.ids_BT.tolist() == [
    [1, 2, 3, 9, 9, 9],
    [9, 9, 9, 9, 9, 9],
    [4, 5, 6, 7, 8, 9],
  ]
  assert tokens.segments_BT.tolist() == [
    [1, 1, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [1, 1, 2, 3, 3, 0],
  ]
  # The EOS, 9, is trained though it is the pad; padding and empty rows are
  # not, nor is a first token, that nothing of its document predicts.
  assert tokens.mask_BT.astype(int).tolist() == [
    [0, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [0, 1, 0, 0, 1, 0],
  ]
  assert tokens.ids_BT.dtype == tokens.segments_BT.dtype == np.int32
  assert tokens.mask_BT.dtype == bool


def test_eos_is_trained_though_it_is_the_pad(tiny_tokenizer_dir):
  tokenizer = tokenizer_lib.load(tiny_tokenizer_dir)
  tokenizer.pad_token = tokenizer.eos_token
  row = Row('Name a bird', references=('Crow',))
  pair = encoding.encode(tokenizer, row, 'raw')
  tokens = next(
    make(texts.of([pair]), pad_id=tokenizer_lib.pad_id(tokenizer), buckets=None)
  ).student
  trained = tokens.ids_BT[tokens.mask_BT]
  assert tokenizer.decode(trained) == f'Crow{tokenizer.eos_token}'


def test_ids_above_65535_survive():
  found = texts.of([([151_643], [70_000, 151_645])])
  tokens = next(make(found, batch_size=1)).student
  assert tokens.ids_BT[0, :3].tolist() == [151_643, 70_000, 151_645]


def test_both_models_read_the_same_arrays():
  batch = next(make(some_texts()))
  assert batch.teacher is batch.student
  assert batch.align == {}
  assert {type(leaf) for leaf in jax.tree.leaves(batch)} == {np.ndarray}


# The iterator.


@pytest.mark.parametrize('packing', [False, True])
def test_an_epoch_holds_every_example_once(packing):
  batches = make(some_texts(), packing=packing, seed=3, epochs=2)
  seen = [collections.Counter(), collections.Counter()]
  for step, batch in enumerate(batches):
    tokens = batch.student
    ids = tokens.ids_BT[tokens.segments_BT > 0]
    seen[step // batches.steps_per_epoch].update((ids - 100_000).tolist())
    # Documents are told apart where they are packed.
    changes = np.diff(tokens.ids_BT, axis=1) != 0
    np.testing.assert_array_equal(
      changes, np.diff(tokens.segments_BT, axis=1) != 0
    )
  assert step + 1 == 2 * batches.steps_per_epoch
  assert seen == [collections.Counter(dict(enumerate(lengths())))] * 2
  assert 0 < batches.padding < 0.5


@pytest.mark.parametrize('packing', [False, True])
@pytest.mark.parametrize('drop_last', [False, True])
def test_padding_is_what_the_batches_show(packing, drop_last):
  batches = make(some_texts(), packing=packing, drop_last=drop_last, epochs=1)
  segments = [batch.student.segments_BT for batch in batches]
  empty = sum((s == 0).sum() for s in segments) / sum(s.size for s in segments)
  assert batches.padding == pytest.approx(empty)


def test_room_for_responses_is_beyond_the_bucket_of_the_prompt():
  """Prompts of 3 and 9, and one whose response takes more than the room."""
  found = texts.of(
    [
      ([*range(p)], [*range(50, 50 + r)])
      for p, r in [(3, 2), (3, 4), (9, 1), (3, 8)]
    ]
  )
  batches = pipeline.batches(
    found,
    batch_size=2,
    max_length=12,
    buckets=(4, 12),
    pad_id=0,
    room=5,
    epochs=1,
  )
  shown = list(batches)
  assert [b.student.ids_BT.shape for b in shown] == [(2, 9), (2, 17)]
  assert [b.student.mask_BT.sum() for b in shown] == [6, 9]
  assert batches.padding == pytest.approx(1 - 33 / (18 + 34))
  with pytest.raises(UserError, match='no room for responses'):
    pipeline.batches(
      found, batch_size=2, max_length=12, pad_id=0, packing=True, room=5
    )
  with pytest.raises(UserError, match=r'max_length less the 5 tokens .*, 12'):
    pipeline.batches(
      found, batch_size=2, max_length=12, pad_id=0, buckets=(17,), room=5
    )


def test_order_depends_on_seed_and_epoch_alone():
  batches = make(some_texts(), seed=3)
  n = batches.steps_per_epoch
  first, second = take(batches, n), take(batches, n)
  assert first != second
  assert take(make(some_texts(), seed=3), 2 * n) == first + second
  assert take(make(some_texts(), seed=4), n) != first
  batches = make(some_texts())
  assert take(batches, n) == take(batches, n)


@pytest.mark.parametrize('step', [0, 5, 40])
def test_resume(step):
  batches = make(some_texts(), seed=3)
  take(batches, step)
  state = batches.get_state()
  rest = take(batches, 30)
  resumed = make(some_texts(), seed=3)
  take(resumed, 2)  # Whatever it did before is forgotten.
  resumed.set_state(state)
  assert take(resumed, 30) == rest
  assert resumed.get_state() == batches.get_state()


def test_resume_at_the_end_is_the_end():
  batches = make(some_texts(), epochs=1)
  n = len(take(batches, 10_000))
  assert n == batches.steps_per_epoch
  resumed = make(some_texts(), epochs=1)
  resumed.set_state(batches.get_state())
  assert take(resumed, 1) == []


def test_epochs_that_differ_in_length_follow_each_other():
  """Weights choose what is packed: an epoch may need one bin more."""
  found = texts.of([([i], [i] * n) for i, n in enumerate([1] * 7 + [7] * 7)])
  batches = make(
    found,
    batch_size=1,
    max_length=8,
    buckets=(8,),
    packing=True,
    seed=1,
    weights=(0.5,),
    epochs=6,
  )
  seen, starts = [], [batches.steps(e) for e in range(7)]
  assert len(set(np.diff(starts))) > 1
  for batch in batches:
    seen.append(batch.student.ids_BT[batch.student.segments_BT > 0])
  assert len(seen) == starts[-1]
  for first, end in itertools.pairwise(starts):
    assert len(np.unique(np.concatenate(seen[first:end]))) == 7
  assert batches.steps(1.5) == starts[1] + -(-(starts[2] - starts[1]) // 2)
  batches.set_state({'step': starts[3]})
  np.testing.assert_array_equal(
    next(batches).student.ids_BT[0][: len(seen[starts[3]])], seen[starts[3]]
  )


@pytest.mark.parametrize('packing', [False, True])
def test_processes_share_the_global_batch(packing):
  whole = make(some_texts(), seed=3, packing=packing, epochs=1)
  parts = [
    make(
      some_texts(),
      seed=3,
      packing=packing,
      epochs=1,
      rows=rows,
    )
    for rows in ([0, 1], [2, 3])
  ]
  for batch, a, b in zip(whole, *parts, strict=True):
    assert a.student.ids_BT.shape[0] == 2
    joined = jax.tree.map(lambda *x: np.concatenate(x), a, b)
    jax.tree.map(np.testing.assert_array_equal, joined, batch)


def test_bad_arguments():
  with pytest.raises(UserError, match='must ascend to max_length, 32'):
    make(some_texts(), buckets=(8, 16))
  with pytest.raises(UserError, match='must ascend'):
    make(some_texts(), buckets=(16, 8, 32))
  with pytest.raises(UserError, match='batch_size is 0: it must be at least 1'):
    make(some_texts(), batch_size=0)
  with pytest.raises(UserError, match='no texts'):
    make(texts.of([]))
  with pytest.raises(UserError, match=r'without its last batch; set .*drop_la'):
    make(some_texts(3), drop_last=True)


def test_real_rows_end_to_end(shared_dir, tmp_path):
  tokenizer = tokenizer_lib.load(shared_dir / 'tokenizers/qwen3')
  file = shared_dir / 'data/dolly/test.jsonl'
  every, bad = texts.load(
    file,
    sources.identity(file),
    tokenizer,
    template='qwen3',
    rules=Rules(),
    thinking='refuse',
    root=tmp_path,
  )
  assert not bad
  found, cut = every.fit(256, 128)
  assert 0 < len(found) < len(every) == 500
  batches = pipeline.batches(
    found, batch_size=8, max_length=256, pad_id=151_643, packing=True, epochs=1
  )
  assert batches.padding < 0.1
  ends = 0
  for batch in batches:
    tokens = batch.student
    ends += (tokens.ids_BT[tokens.mask_BT] == 151_645).sum()
    assert not (tokens.ids_BT[tokens.mask_BT] == 151_643).any()
  assert ends == len(found) - cut
