import collections
import functools
import itertools

import jax
import numpy as np
import pytest

from gakd_jax import UserError
from gakd_jax.data import pipeline
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.pipeline import Example
from gakd_jax.data.sources import BadRow, Row, load

BUCKETS = (8, 16, 32)


@pytest.fixture(scope='module')
def tiny(tiny_tokenizer_dir):
  return tokenizer_lib.load(tiny_tokenizer_dir)


def lengths(n=101, seed=0):
  return np.random.default_rng(seed).integers(2, 33, n).tolist()


def examples(n=101):
  """Examples whose every token is 100000 + their index."""
  return [
    Example(
      np.full(length // 2, 100_000 + i, np.int32),
      np.full(length - length // 2, 100_000 + i, np.int32),
      Row('x'),
    )
    for i, length in enumerate(lengths(n))
  ]


make = functools.partial(
  pipeline.batches, batch_size=4, max_length=32, pad_id=0, buckets=BUCKETS
)


def take(iterator, n):
  """The next n batches, as hashable values."""
  return [
    tuple((leaf.shape, leaf.tobytes()) for leaf in jax.tree.leaves(batch))
    for batch in itertools.islice(iterator, n)
  ]


# From rows to examples.


def encode(rows, tokenizer, **options):
  options = {'max_length': 40, 'max_prompt_length': 20} | options
  return pipeline.encode_rows(rows, tokenizer, template='raw', **options)


def test_encode_rows(tiny):
  rows = [
    Row('ab', references=('cd', 'other')),
    Row('x' * 21, references=('y',), where='f:2'),
    Row('x' * 20, references=('y' * 50,)),
    Row('x' * 20, references=('y' * 19,)),
    Row('x' * 20, references=('y' * 20,)),
    Row('only'),
    Row('x', messages=({'role': 'user', 'content': 'x'},) * 2, where='f:7'),
  ]
  found, bad = encode(rows, tiny)
  assert bad == {
    'prompt too long': 1,
    'this template holds one user turn only': 1,
  }
  assert [example.row for example in found] == [rows[0], *rows[2:6]]
  eos = tiny.eos_token_id
  ab, cut, full, lost_eos, only = found
  assert ab.response_ids.tolist() == [*tiny('cd').input_ids, eos]
  assert ab.prompt_ids.dtype == ab.response_ids.dtype == np.int32
  # A cut response is not over: it has no EOS to train.
  assert cut.truncated
  assert len(cut.response_ids) == 20
  assert eos not in cut.response_ids
  assert not full.truncated
  assert full.response_ids[-1] == eos
  assert full.length == 40
  assert lost_eos.truncated
  assert eos not in lost_eos.response_ids
  assert not only.truncated
  assert len(only.response_ids) == 0
  assert pipeline.stats(found) == {
    'examples': 5,
    'truncated': 2,
    'prompt_tokens': sum(len(e.prompt_ids) for e in found),
    'response_tokens': 3 + 20 + 20 + 20,
  }


def test_encode_rows_fails_when_told_to(tiny):
  rows = [Row('ok', references=('y',)), Row('x' * 21, where='f.jsonl:2')]
  with pytest.raises(BadRow, match=r'^f.jsonl:2: prompt too long;'):
    encode(rows, tiny, on_bad_row='fail')
  turns = ({'role': 'user', 'content': 'x'},) * 2
  with pytest.raises(BadRow, match=r'^f.jsonl:3: .*one user turn'):
    encode(
      [Row('x', messages=turns, where='f.jsonl:3')], tiny, on_bad_row='fail'
    )


def test_encode_rows_with_nothing_left(tiny):
  with pytest.raises(UserError, match=r'none of 2 rows.*2 prompt too long'):
    encode([Row('x' * 30)] * 2, tiny)
  with pytest.raises(UserError, match='must leave room'):
    encode([Row('x')], tiny, max_prompt_length=40)
  with pytest.raises(UserError, match='did you mean'):
    pipeline.encode_rows(
      [Row('x')], tiny, template='rawr', max_length=4, max_prompt_length=2
    )


def test_thoughts_are_refused_or_kept(tiny):
  rows = [
    Row('a', references=('<think>b</think>c',), where='f:1'),
    Row('a', references=('c',), where='f:2'),
  ]
  settings = {'template': 'gakd', 'max_length': 400, 'max_prompt_length': 300}
  examples, bad = pipeline.encode_rows(rows, tiny, **settings)
  assert [example.row.where for example in examples] == ['f:2']
  assert bad.total() == 1
  examples, bad = pipeline.encode_rows(rows, tiny, thinking='keep', **settings)
  assert len(examples) == 2
  assert not bad


def test_encode_rows_in_chunks(tiny, monkeypatch):
  rows = [Row(f'p{i}', references=(f'r{i}',)) for i in range(10)]
  whole, _ = encode(rows, tiny)
  monkeypatch.setattr(pipeline, '_CHUNK', 3)
  parts, _ = encode(rows, tiny)
  assert [e.row for e in parts] == rows
  for a, b in zip(whole, parts, strict=True):
    np.testing.assert_array_equal(a.response_ids, b.response_ids)


# Which examples share a batch.


def plan(**options):
  options = {'batch_size': 4, 'buckets': BUCKETS, 'seed': 1} | options
  return pipeline.arrange(lengths(), **options)


@pytest.mark.parametrize('packing', [False, True])
@pytest.mark.parametrize('seed', [None, 1])
def test_arrange_loses_and_repeats_nothing(packing, seed):
  batches = plan(packing=packing, seed=seed)
  assert all(len(bins) == 4 for _, bins in batches)
  indices = [i for _, bins in batches for bin_ in bins for i in bin_]
  assert sorted(indices) == list(range(101))
  for length, bins in batches:
    assert length in BUCKETS
    assert all(sum(lengths()[i] for i in bin_) <= length for bin_ in bins)
  empty = sum(not bin_ for _, bins in batches for bin_ in bins)
  assert empty < 4


def test_arrange_uses_the_shortest_bucket_that_fits():
  batches = plan()
  singles = [bin_ for _, bins in batches for bin_ in bins if bin_]
  assert all(len(bin_) == 1 for bin_ in singles)
  own = collections.Counter(
    next(b for b in BUCKETS if n <= b) for n in lengths()
  )
  used = collections.Counter()
  for length, bins in batches:
    used[length] += len(bins)
  # Only what fills no batch moves up: fewer than a batch from each bucket.
  assert own[8] - 4 < used[8] <= own[8]
  assert own[16] - 4 < used[16] <= own[16] + 3


def test_arrange_of_a_few_short_examples_stays_short():
  assert pipeline.arrange([3, 5], batch_size=4, buckets=BUCKETS) == [
    (8, [[0], [1], [], []])
  ]


def test_arrange_without_seed_keeps_the_order():
  batches = pipeline.arrange(
    [9, 3, 30, 4, 12, 5], batch_size=2, buckets=BUCKETS
  )
  assert batches == [(8, [[1], [3]]), (16, [[5], [0]]), (32, [[4], [2]])]
  assert plan(seed=None) == plan(seed=None, epoch=3)


def test_arrange_is_a_function_of_seed_and_epoch():
  assert plan(epoch=3) == plan(epoch=3)
  plans = [plan(), plan(epoch=1), plan(seed=2)]
  assert all(a != b for a, b in itertools.combinations(plans, 2))


@pytest.mark.parametrize('packing', [False, True])
def test_arrange_has_the_same_length_in_every_epoch(packing):
  assert len({len(plan(packing=packing, epoch=e)) for e in range(20)}) == 1


def test_arrange_shuffles_the_order_of_buckets():
  order = [length for length, _ in plan()]
  assert order != sorted(order)


def test_packing_fills_bins():
  batches = plan(packing=True)
  bins = [bin_ for _, bins in batches for bin_ in bins if bin_]
  least = -(-sum(lengths()) // 32)
  assert len(bins) <= 1.05 * least + 1
  # The first epochs pack other examples together.
  assert {frozenset(b) for b in bins} != {
    frozenset(b) for _, bs in plan(packing=True, epoch=1) for b in bs if b
  }


def test_arrange_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match='33 tokens do not fit'):
    pipeline.arrange([33], batch_size=1, buckets=BUCKETS)


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


# From examples to arrays.


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
  found, _ = encode([Row('Name a bird', references=('Crow',))], tokenizer)
  tokens = next(
    make(found, pad_id=tokenizer_lib.pad_id(tokenizer), buckets=None)
  ).student
  trained = tokens.ids_BT[tokens.mask_BT]
  assert tokenizer.decode(trained) == f'Crow{tokenizer.eos_token}'


def test_ids_above_65535_survive():
  found = [Example(np.array([151_643]), np.array([70_000, 151_645]), Row('x'))]
  tokens = next(make(found, batch_size=1)).student
  assert tokens.ids_BT[0, :3].tolist() == [151_643, 70_000, 151_645]


def test_both_models_read_the_same_arrays():
  batch = next(make(examples()))
  assert batch.teacher is batch.student
  assert batch.align == {}
  assert {type(leaf) for leaf in jax.tree.leaves(batch)} == {np.ndarray}


# The iterator.


@pytest.mark.parametrize('packing', [False, True])
def test_an_epoch_holds_every_example_once(packing):
  batches = make(examples(), packing=packing, seed=3, epochs=2)
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


def test_padding_is_what_the_batches_show():
  batches = make(examples(), epochs=1)
  segments = [batch.student.segments_BT for batch in batches]
  empty = sum((s == 0).sum() for s in segments) / sum(s.size for s in segments)
  assert batches.padding == pytest.approx(empty)


def test_room_for_responses_is_beyond_the_bucket_of_the_prompt():
  """Prompts of 3 and 9, and one whose response takes more than the room."""
  examples = [
    pipeline.Example(np.arange(p, dtype=np.int32), np.arange(r) + 50, None)
    for p, r in [(3, 2), (3, 4), (9, 1), (3, 8)]
  ]
  batches = pipeline.batches(
    examples,
    batch_size=2,
    max_length=12,
    buckets=(4, 12),
    pad_id=0,
    room=5,
    epochs=1,
  )
  found = list(batches)
  assert [b.student.ids_BT.shape for b in found] == [(2, 9), (2, 17)]
  assert [b.student.mask_BT.sum() for b in found] == [6, 9]
  assert batches.padding == pytest.approx(1 - 33 / (18 + 34))
  with pytest.raises(UserError, match='no room for responses'):
    pipeline.batches(
      examples, batch_size=2, max_length=12, pad_id=0, packing=True, room=5
    )
  with pytest.raises(UserError, match=r'max_length less the 5 tokens .*, 12'):
    pipeline.batches(
      examples, batch_size=2, max_length=12, pad_id=0, buckets=(17,), room=5
    )


def test_order_depends_on_seed_and_epoch_alone():
  batches = make(examples(), seed=3)
  n = batches.steps_per_epoch
  first, second = take(batches, n), take(batches, n)
  assert first != second
  assert take(make(examples(), seed=3), 2 * n) == first + second
  assert take(make(examples(), seed=4), n) != first
  batches = make(examples())
  assert take(batches, n) == take(batches, n)


@pytest.mark.parametrize('step', [0, 5, 40])
def test_resume(step):
  batches = make(examples(), seed=3)
  take(batches, step)
  state = batches.get_state()
  rest = take(batches, 30)
  resumed = make(examples(), seed=3)
  take(resumed, 2)  # Whatever it did before is forgotten.
  resumed.set_state(state)
  assert take(resumed, 30) == rest
  assert resumed.get_state() == batches.get_state()


def test_resume_at_the_end_is_the_end():
  batches = make(examples(), epochs=1)
  n = len(take(batches, 10_000))
  assert n == batches.steps_per_epoch
  resumed = make(examples(), epochs=1)
  resumed.set_state(batches.get_state())
  assert take(resumed, 1) == []


def test_workers_change_nothing():
  alone = make(examples(), seed=3)
  expected = take(alone, 60)
  # The run goes on with other workers than it had, and back.
  alone.set_state({'step': 5})
  with_workers = make(examples(), seed=3, workers=2)
  with_workers.set_state(alone.get_state())
  assert take(with_workers, 30) == expected[5:35]
  batch = next(with_workers)
  assert {type(leaf) for leaf in jax.tree.leaves(batch)} == {np.ndarray}
  alone.set_state(with_workers.get_state())
  assert take(alone, 24) == expected[36:]
  with_workers.close()
  with_workers.close()


@pytest.mark.parametrize('packing', [False, True])
def test_processes_share_the_global_batch(packing):
  whole = make(examples(), seed=3, packing=packing, epochs=1)
  parts = [
    make(
      examples(),
      seed=3,
      packing=packing,
      epochs=1,
      process_index=i,
      process_count=2,
    )
    for i in range(2)
  ]
  for batch, a, b in zip(whole, *parts, strict=True):
    assert a.student.ids_BT.shape[0] == 2
    joined = jax.tree.map(lambda *x: np.concatenate(x), a, b)
    jax.tree.map(np.testing.assert_array_equal, joined, batch)


def test_bad_arguments():
  with pytest.raises(UserError, match='must ascend to max_length, 32'):
    make(examples(), buckets=(8, 16))
  with pytest.raises(UserError, match='must ascend'):
    make(examples(), buckets=(16, 8, 32))
  with pytest.raises(UserError, match='multiple of the 3 processes'):
    make(examples(), process_count=3)
  with pytest.raises(UserError, match='no examples'):
    make([])


def test_real_rows_end_to_end(shared_dir):
  tokenizer = tokenizer_lib.load(shared_dir / 'tokenizers/qwen3')
  rows, _ = load(shared_dir / 'data/dolly/test.jsonl')
  found, bad = pipeline.encode_rows(
    rows, tokenizer, template='qwen3', max_length=256, max_prompt_length=128
  )
  assert len(found) + bad.total() == len(rows)
  assert set(bad) == {'prompt too long'}
  batches = pipeline.batches(
    found, batch_size=8, max_length=256, pad_id=151_643, packing=True, epochs=1
  )
  assert batches.padding < 0.1
  ends = 0
  for batch in batches:
    tokens = batch.student
    ends += (tokens.ids_BT[tokens.mask_BT] == 151_645).sum()
    assert not (tokens.ids_BT[tokens.mask_BT] == 151_643).any()
  assert ends == sum(not example.truncated for example in found)
