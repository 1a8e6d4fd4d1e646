"""What holds of any data: of files, rows, stores, plans and batches."""

import collections
import contextlib
import gzip
import itertools
import json
import shutil

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from gakd_jax import UserError
from gakd_jax.data import (
  arrange,
  encoding,
  pipeline,
  segments,
  sources,
  store,
  texts,
)
from gakd_jax.data import rows as rows_lib
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.records import BadRow
from gakd_jax.data.sources import Rules

pytestmark = pytest.mark.slow  # Many.

# Files and records.

FIELDS = (
  *('instruction', 'input', 'output', 'context', 'response', 'question'),
  *('answer', 'prompt', 'completion', 'query', 'dialogue', 'summary'),
  *('messages', 'conversations', 'system', 'history', 'tools', 'choices'),
  *('role', 'content', 'from', 'value', 'weight', 'type', 'text', 'other'),
)
WORDS = st.sampled_from(['user', 'assistant', 'system', 'text', 'a', '', ' '])
SCALARS = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | WORDS
  | st.text(max_size=5)
)
JSON = st.recursive(
  SCALARS,
  lambda x: (
    st.lists(x, max_size=3)
    | st.dictionaries(st.sampled_from(FIELDS), x, max_size=4)
  ),
  max_leaves=12,
)
TURN = st.fixed_dictionaries(
  {'role': WORDS | JSON, 'content': WORDS | JSON}, optional={'weight': JSON}
)
RECORD = JSON | st.fixed_dictionaries({'messages': st.lists(TURN, max_size=4)})
RECORD |= st.fixed_dictionaries(
  {'instruction': WORDS | JSON, 'output': WORDS | JSON},
  optional={x: JSON for x in ('input', 'answer', 'system', 'history', 'tools')},
)


def line(record):
  return json.dumps(record).encode('utf-8', 'surrogatepass')


LINES = st.binary(max_size=30) | RECORD.map(line)
LINES |= st.builds(
  lambda x, at, end: line(x)[:at] + end,
  RECORD,
  st.integers(0, 40),
  st.binary(max_size=3),
)
CONTENTS = st.lists(LINES, max_size=6).map(b'\n'.join)


def check_row(row):
  """Texts and nothing else, which a tokenizer can take."""
  said = [row.instruction, row.input, row.answer, *row.references]
  for turn in row.messages or ():
    assert turn.keys() == {'role', 'content'}
    assert turn['role'] in ('system', 'user', 'assistant')
    said.append(turn['content'])
  for text in said:
    assert type(text) is str
    text.encode()
  assert row.text.strip()
  assert all(text.strip() for text in row.references)


def check_line(error, *said):
  assert str(error).isprintable()
  assert all(x in str(error) for x in said)


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.jsonl.gz'])
def test_any_bytes_are_rows_bad_rows_or_one_error(holds, tmp_path, name):
  def check(content, turns):
    content = gzip.compress(content) if name.endswith('gz') else content
    (tmp_path / name).write_bytes(content)
    rules = Rules(turns=turns)
    try:
      found = [row for _, _, row in sources.stream(tmp_path / name, rules)]
    except UserError as error:
      check_line(error, 'a.json: not a JSON array')
      return
    for row in found:
      if isinstance(row, BadRow):
        check_line(row, f'{tmp_path / name}')
      else:
        check_row(row)
    good = [row for row in found if not isinstance(row, BadRow)]
    with contextlib.ExitStack() as stack:
      if not good:
        stack.enter_context(pytest.raises(UserError, match='no usable row'))
      rows, bad = sources.load(tmp_path / name)
      if turns == 'last':
        assert rows == good
        assert len(rows) + bad.total() == len(found)

  holds(check, content=CONTENTS, turns=st.sampled_from(['last', 'all']))


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.parquet', 'a.arrow'])
def test_any_bytes_of_other_kinds_are_one_error(holds, tmp_path, name):
  def check(content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
      sources.load(tmp_path / name)
    check_line(error.value, f'{tmp_path / name}: ')

  holds(check, content=st.binary(max_size=60))


@pytest.mark.parametrize('kind', ['arrow', 'parquet'])
def test_damaged_tables_are_rows_bad_rows_or_one_error(holds, tmp_path, kind):
  record = {'instruction': 'abc', 'output': ['b', 'c'], 'answer': 1.5}
  table = pyarrow.Table.from_pylist([record] * 30)
  path = tmp_path / f'a.{kind}'
  if kind == 'arrow':
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
      stream.write_table(table, max_chunksize=10)
  else:
    pyarrow.parquet.write_table(table, path)
  whole = path.read_bytes()

  def check(changes):
    content = bytearray(whole)
    for at, byte in changes.items():
      content[at] = byte
    path.write_bytes(content)
    try:
      rows, _ = sources.load(path)
    except UserError as error:
      check_line(error, f'{path}: ')
      return
    for row in rows:
      check_row(row)

  at = st.integers(0, len(whole) - 1)
  changes = st.dictionaries(at, st.integers(0, 255), min_size=1, max_size=8)
  holds(check, changes=changes)


def test_any_record_is_rows_or_a_bad_row(holds, tiny_tokenizer_dir):
  tokenizer = tokenizer_lib.load(tiny_tokenizer_dir)

  def check(record, need_response, turns, template):
    rules = Rules(need_response=need_response, turns=turns)
    try:
      found = rows_lib.read('here', record, rules)
    except BadRow as error:
      check_line(error, 'here: ')
      return
    for row, ids in zip(
      found,
      encoding.encode_batch(tokenizer, found, template, 'keep'),
      strict=True,
    ):
      check_row(row)
      assert bool(row.references) or not need_response
      if not isinstance(ids, BadRow):
        assert ids[0]
        assert bool(ids[1]) == bool(row.references)

  holds(
    check,
    record=RECORD,
    need_response=st.booleans(),
    turns=st.sampled_from(['last', 'all']),
    template=st.sampled_from(['raw', 'alpaca', 'chat']),
  )


# Stores.


def test_a_store_is_never_wrong(holds, tmp_path):
  """Whatever byte of whatever file has changed, or how much is gone."""
  made = []

  def make(add):
    made.append(1)
    add(ids=np.arange(50, dtype=np.int32), flags=np.array([True, False]))
    return {'bad': {'x': 2}}

  arrays, facts = store.load(tmp_path / 'whole', 'key', make)
  arrays = {name: x.tolist() for name, x in arrays.items()}
  (whole,) = (x for x in (tmp_path / 'whole').iterdir() if x.is_dir())
  folder = tmp_path / 'damaged' / whole.name

  def check(name, how, at, bits):
    shutil.rmtree(tmp_path / 'damaged', ignore_errors=True)
    shutil.copytree(whole, folder)
    content = (folder / name).read_bytes()
    at %= len(content)
    if how == 'flip':
      changed = bytes([content[at] ^ bits])
      (folder / name).write_bytes(content[:at] + changed + content[at + 1 :])
    elif how == 'cut':
      (folder / name).write_bytes(content[:at])
    elif how == 'longer':
      (folder / name).write_bytes(content + bytes([bits]))
    else:
      (folder / name).unlink()
    before = len(made)
    again, said = store.load(tmp_path / 'damaged', 'key', make)
    assert {name: x.tolist() for name, x in again.items()} == arrays
    assert said == facts
    # Between two values of a JSON file, a blank is as good as a tab.
    assert len(made) > before or name == 'about.json'

  holds(
    check,
    name=st.sampled_from(['ids.bin', 'flags.bin', 'about.json']),
    how=st.sampled_from(['flip', 'flip', 'cut', 'longer', 'gone']),
    at=st.integers(0, 10_000),
    bits=st.integers(1, 255),
  )


@pytest.mark.parametrize('about', ['[]', '5', '{}', '{"arrays": 3}', 'null'])
def test_what_is_no_store_is_made(tmp_path, about):
  def make(add):
    add(ids=np.arange(3))
    return {}

  store.load(tmp_path, 'key', make)
  (file,) = tmp_path.glob('*/about.json')
  file.write_text(about)
  assert store.load(tmp_path, 'key', make)[0]['ids'].tolist() == [0, 1, 2]


# Plans and batches.

LENGTHS = st.lists(st.integers(0, 16), min_size=1, max_size=30)
BUCKETS = st.sampled_from([(16,), (8, 16), (4, 8, 16), (1, 16)])


def test_a_plan_holds_every_text_as_often_as_it_should(holds):
  def check(lengths, batch_size, buckets, packing, seed, drop_last, times):
    times = None if times is None else np.full(len(lengths), times)
    plan = arrange.arrange(
      lengths,
      batch_size=batch_size,
      buckets=buckets,
      packing=packing,
      seed=seed,
      times=times,
      drop_last=drop_last,
    )
    seen = collections.Counter()
    for length, bins in plan:
      assert length in buckets
      assert len(bins) == batch_size
      for some in bins:
        assert sum(lengths[i] for i in some) <= length
        assert packing or len(some) <= 1
        seen.update(some.tolist())
    wanted = len(lengths) if times is None else round(sum(times))
    if drop_last:
      assert plan.empty == 0
      assert seen.total() <= wanted
    else:
      assert seen.total() == wanted
      assert plan.empty < batch_size
    most = 1 if times is None else int(np.ceil(times[0]))
    assert max(seen.values(), default=0) <= most

  holds(
    check,
    lengths=LENGTHS,
    batch_size=st.integers(1, 5),
    buckets=BUCKETS,
    packing=st.booleans(),
    seed=st.none() | st.integers(0, 5),
    drop_last=st.booleans(),
    times=st.none() | st.sampled_from([1.0, 2.0, 3.0]),
  )


PAIRS = st.lists(
  st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=25
)


def leaves(batch):
  return [(x.shape, x.tobytes()) for x in jax.tree.leaves(batch)]


def test_batches_are_a_function_of_texts_seed_and_step(holds):
  """Whoever makes them, from wherever; documents and their masks stay whole."""

  def check(sizes, batch_size, buckets, packing, seed, stop, cut):
    pairs = [
      ([100 * i + 1] * p, [100 * i + 2] * r) for i, (p, r) in enumerate(sizes)
    ]

    def make(**options):
      return pipeline.batches(
        texts.of(pairs),
        batch_size=batch_size,
        max_length=16,
        pad_id=0,
        buckets=buckets,
        packing=packing,
        seed=seed,
        epochs=2,
        **options,
      )

    every = [*make()]
    n = make().steps_per_epoch
    for epoch in (every[:n], every[n:]):
      assert documents(epoch) == sorted(x for x in pairs if sum(map(len, x)))
    # Of processes that each make some rows.
    cut %= batch_size + 1
    shares = [make(rows=range(cut)), make(rows=range(cut, batch_size))]
    for whole, *parts in zip(every, *shares, strict=True):
      joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
      assert leaves(joined) == leaves(whole)
    # Of a run that goes on.
    stop %= len(every) + 1
    first = make()
    assert len([*itertools.islice(first, stop)]) == stop
    state = json.loads(json.dumps(first.get_state()))
    again = make()
    again.set_state(state)
    assert [*map(leaves, again)] == [*map(leaves, every[stop:])]

  holds(
    check,
    sizes=PAIRS,
    batch_size=st.integers(1, 4),
    buckets=BUCKETS,
    packing=st.booleans(),
    seed=st.none() | st.integers(0, 5),
    stop=st.integers(0, 100),
    cut=st.integers(0, 4),
  )


def documents(batches):
  """The (prompt, response) pairs of batches, sorted, by segments and masks."""
  found = []
  for batch in batches:
    x = batch.student
    for ids, of, mask in zip(x.ids_BT, x.segments_BT, x.mask_BT, strict=True):
      assert not ids[of == 0].any()
      assert not mask[of == 0].any()
      assert {*of} - {0} == {*range(1, of.max() + 1)}
      for n in range(1, of.max() + 1):
        (at,) = np.nonzero(of == n)
        assert at.tolist() == [*range(at[0], at[-1] + 1)]
        prompt = ids[at][ids[at] % 100 == 1].tolist()
        response = ids[at][ids[at] % 100 == 2].tolist()
        # All of a response, but for a document's first token.
        assert mask[at].tolist() == [
          i >= max(1, len(prompt)) for i in range(len(at))
        ]
        assert [*prompt, *response] == ids[at].tolist()
        found.append((prompt, response))
  return sorted(found)


SEGMENTS = st.lists(
  st.lists(st.integers(1, 6), max_size=6), min_size=3, max_size=3
)


def test_sums_and_places_within_segments(holds):
  def check(sizes, gap):
    segments_BT = np.zeros((3, 12), np.int32)
    for row, some in zip(segments_BT, sizes, strict=True):
      at = gap
      for n, size in enumerate(some, start=1):
        row[at : at + size] = n
        at += size
    x_BT = np.arange(36, dtype=np.float32).reshape(3, 12)
    total_BT, place_BT = np.zeros((3, 12)), np.zeros((3, 12), int)
    last_BT = np.zeros((3, 12), bool)
    for b, row in enumerate(segments_BT):
      for n in {*row.tolist()} - {0}:
        (at,) = np.nonzero(row == n)
        total_BT[b, at] = x_BT[b, at].sum()
        place_BT[b, at] = np.arange(len(at))
        last_BT[b, at[-1]] = True
    there = segments_BT > 0
    positions_BT = np.asarray(segments.positions(segments_BT))
    np.testing.assert_array_equal(positions_BT[there], place_BT[there])
    np.testing.assert_array_equal(segments.is_last(segments_BT), last_BT)
    total = segments.total(jax.numpy.asarray(x_BT), segments_BT)
    np.testing.assert_array_equal(total, total_BT)

  holds(check, sizes=SEGMENTS, gap=st.integers(0, 3))
