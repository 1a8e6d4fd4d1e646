import dataclasses
import gzip
import json

import pytest

from gakd_jax import UserError
from gakd_jax.data import sources

PAIR = {'instruction': 'Add.', 'input': '1 2', 'output': '3'}


def write(path, *rows):
  path.write_text('\n'.join(json.dumps(row) for row in rows))
  return path


def load_one(tmp_path, record, **options):
  (row,), bad = sources.load(write(tmp_path / 'one.jsonl', record), **options)
  assert not bad
  return row


@pytest.mark.parametrize(
  ('record', 'expected'),
  [
    (PAIR, ('Add.', '1 2', ('3',))),
    ({'instruction': 'Hi', 'output': 'Ho'}, ('Hi', '', ('Ho',))),
    ({'instruction': 'Hi', 'input': ' ', 'output': 'a'}, ('Hi', '', ('a',))),
    ({'question': '1+1?', 'answer': '#### 2'}, ('1+1?', '', ('#### 2',))),
    ({'prompt': 'Hi', 'response': ['a', ' ', 'b']}, ('Hi', '', ('a', 'b'))),
    # Data sets keep the rendered prompt, or Parquet's nulls, beside the fields.
    ({'prompt': 'x', 'response': 'y', **PAIR}, ('Add.', '1 2', ('3',))),
    ({'messages': None, 'question': None, **PAIR}, ('Add.', '1 2', ('3',))),
    ({'prompt': 'x', 'question': 'q', 'answer': 'a'}, ('q', '', ('a',))),
    ({'question': 'q', 'answer': 'a', 'input': 'other'}, ('q', '', ('a',))),
    # As Dolly's authors, UltraInteract and MetaMath have it.
    (
      {'instruction': 'Hi', 'context': 'c', 'response': 'Ho'},
      ('Hi', 'c', ('Ho',)),
    ),
    (
      {'instruction': 'Hi', 'input': 'i', 'response': 'Ho', 'context': 'c'},
      ('Hi', 'i', ('Ho',)),
    ),
    ({'instruction': 'Hi', 'response': 'Ho'}, ('Hi', '', ('Ho',))),
    ({'context': 'x', 'response': 'y', **PAIR}, ('Add.', '1 2', ('3',))),
    ({'prompt': 'Hi', 'completion': 'Ho'}, ('Hi', '', ('Ho',))),
    (
      {'query': '2+2?', 'original_question': '1+1?', 'response': '4'},
      ('2+2?', '', ('4',)),
    ),
    (
      {
        'messages': [
          {'role': 'user', 'content': 'Hi'},
          {'role': 'assistant', 'content': 'Ho'},
        ],
        **PAIR,
      },
      ('Hi', '', ('Ho',)),
    ),
    (
      {'dialogue': 'A: Hi', 'summary2': 'b', 'summary1': 'a', 'topic1': 't'},
      ('Summarize the following dialogue.', 'A: Hi', ('a', 'b')),
    ),
    (
      {'question': 'q', 'context': 'c', 'answer': 'a', 'options': []},
      ('q', 'c', ('a',)),
    ),
    (
      {'question': 'q', 'response': 'a', 'id': 't0.1', 'system_prompt': ''},
      ('q', '', ('a',)),
    ),
    ({**PAIR, 'output': '[]'}, ('Add.', '1 2', ('[]',))),
    # As LlamaFactory and ms-swift have rows without.
    (
      {**PAIR, 'system': ' ', 'history': [], 'tools': '[]', 'images': None},
      ('Add.', '1 2', ('3',)),
    ),
    (
      {
        'conversations': [
          {'from': 'human', 'value': 'Hi'},
          {'from': 'gpt', 'value': 'Ho'},
        ],
      },
      ('Hi', '', ('Ho',)),
    ),
    (
      {
        'messages': [
          {
            'role': 'user',
            'content': [
              {'type': 'text', 'text': 'H'},
              {'type': 'text', 'text': 'i'},
            ],
          },
          {'role': 'assistant', 'content': [{'type': 'text', 'text': 'Ho'}]},
        ],
      },
      ('Hi', '', ('Ho',)),
    ),
    (
      {'dialogue': 'A: Hi', 'summary': 'a', 'topic': 't'},
      ('Summarize the following dialogue.', 'A: Hi', ('a',)),
    ),
  ],
)
def test_row_schemas(tmp_path, record, expected):
  row = load_one(tmp_path, record)
  assert (row.instruction, row.input, row.references) == expected
  assert row.messages is None
  assert row.where == f'{tmp_path}/one.jsonl:1'
  with pytest.raises(dataclasses.FrozenInstanceError):
    row.input = ''


def test_an_answer_beside_the_output_is_kept(tmp_path):
  assert load_one(tmp_path, PAIR).answer == ''
  row = load_one(tmp_path, {**PAIR, 'answer': 3.0})
  assert (row.references, row.answer) == (('3',), '3.0')
  # MAWPS has nothing but the answer.
  row = load_one(tmp_path, {**PAIR, 'output': '', 'answer': '3.0'})
  assert (row.references, row.answer) == (('3.0',), '3.0')
  row = load_one(tmp_path, {'question': '1+1?', 'answer': '2'})
  assert (row.references, row.answer) == (('2',), '')


def test_messages_with_turns_keep_all_but_the_answer(tmp_path):
  turns = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Hi'},
  ]
  answer = {'role': 'assistant', 'content': 'Ho', 'name': 'x'}
  row = load_one(tmp_path, {'messages': [*turns, answer]})
  assert row.messages == tuple(turns)
  assert (row.instruction, row.references) == ('Hi', ('Ho',))
  prompt = load_one(tmp_path, {'messages': turns}, need_response=False)
  assert (prompt.messages, prompt.references) == (tuple(turns), ())


SYSTEM = {'role': 'system', 'content': 'In French.'}
HISTORY = [
  {'role': 'user', 'content': 'Hello'},
  {'role': 'assistant', 'content': 'Bonjour'},
]
QUESTION = {'role': 'user', 'content': 'Add.\n1 2'}


@pytest.mark.parametrize(
  ('record', 'turns'),
  [
    ({**PAIR, 'system': 'In French.'}, [SYSTEM, QUESTION]),
    ({**PAIR, 'history': [['Hello', 'Bonjour']]}, [*HISTORY, QUESTION]),
    (
      {
        'system_prompt': 'In French.',
        'query': 'Add.\n1 2',
        'response': '3',
        'history': [['Hello', 'Bonjour']],
      },
      [SYSTEM, *HISTORY, QUESTION],
    ),
    (
      {
        'system': 'In French.',
        'conversations': [
          {'from': 'human', 'value': 'Add.\n1 2'},
          {'from': 'gpt', 'value': '3'},
        ],
      },
      [SYSTEM, QUESTION],
    ),
    (
      {'messages': [SYSTEM, QUESTION], 'system': 'In French.', 'output': '3'},
      [SYSTEM, QUESTION],
    ),
  ],
)
def test_what_stands_before_the_prompt_is_part_of_it(tmp_path, record, turns):
  row = load_one(tmp_path, record)
  assert row.messages == tuple(turns)
  assert (row.instruction, row.input) == ('Add.\n1 2', '')
  assert row.references == ('3',)


NO_PROMPT = 'missing instruction, question, prompt, query, messages, dialogue'
BAD = {
  'not JSON': b'{"instruction": ',
  'not UTF-8': b'{"instruction": "caf\xe9", "output": "x"}',
  'not an object': b'[1]',
  'missing output': b'{"instruction": "x", "question": "q", "answer": "a"}',
  'missing answer': b'{"question": "x", "output": "y"}',
  NO_PROMPT: b'{"text": "x"}',
  'empty response': b'{"instruction": "x", "output": [" ", ""]}',
  'empty prompt': b'{"instruction": " ", "output": "x"}',
  'output is not text': b'{"instruction": "x", "output": ["y", 3]}',
  'input is not text': b'{"instruction": "x", "input": {}, "output": "y"}',
  'messages is not a list': b'{"messages": "x"}',
  'messages need a role and text as content': b'{"messages": [{"role": "x"}]}',
  'has tools, which no template shows': (
    b'{"instruction": "x", "output": "y", "tools": [{"name": "add"}]}'
  ),
  'has images, which no template shows': (
    b'{"query": "x", "response": "y", "images": ["a.png"]}'
  ),
  'has choices, which no template shows': (
    b'{"question": "x", "answer": "y", "choices": ["y", "z"]}'
  ),
  'has reasoning_content, which no template shows': (
    b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", '
    b'"content": "y", "reasoning_content": "hm"}]}'
  ),
  'has tool_calls, which no template shows': (
    b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}'
  ),
  'has history, which no template shows': (
    b'{"messages": [{"role": "user", "content": "x"}], "history": [["a", "b"]]}'
  ),
  "a turn of role 'observation'": (
    b'{"conversations": [{"from": "observation", "value": "x"}]}'
  ),
  'a part of a content is not text': (
    b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}'
  ),
  'conversations is not a list': b'{"conversations": "x"}',
  'system beside the one of messages': (
    b'{"messages": [{"role": "system", "content": "x"}], "system": "y"}'
  ),
  'system is not text': b'{"instruction": "x", "output": "y", "system": 3}',
  'history is no list of [user, assistant]': (
    b'{"instruction": "x", "output": "y", "history": [["a", null]]}'
  ),
  'messages without a last user turn': (
    b'{"messages": [{"role": "assistant", "content": "x"}]}'
  ),
}


def test_bad_rows_are_counted_by_reason(tmp_path):
  good = json.dumps(PAIR).encode()
  half = [  # of a surrogate pair
    b'{"instruction": "x", "output": "\\ud800"}',
    b'{"instruction": "x", "output": "y", "answer": "\\ud800"}',
    b'{"instruction": "x", "output": "y", "id": ["\\udfff"]}',
    b'{"messages": [{"role": "\\ud800", "content": "x"}]}',
  ]
  path = tmp_path / 'mixed.jsonl'
  path.write_bytes(b'\n'.join([good, *BAD.values(), b'', *half, good]))
  rows, bad = sources.load(path)
  assert bad == {**dict.fromkeys(BAD, 1), 'not UTF-8': 1 + len(half)}
  last = len(BAD) + len(half) + 3
  assert [row.where for row in rows] == [f'{path}:1', f'{path}:{last}']


@pytest.mark.parametrize('reason', BAD)
def test_fail_names_file_line_and_reason(tmp_path, reason):
  path = tmp_path / 'mixed.jsonl'
  path.write_bytes(json.dumps(PAIR).encode() + b'\n' + BAD[reason])
  with pytest.raises(UserError) as error:
    sources.load(path, on_bad_row='fail')
  assert str(error.value).startswith(f'{path}:2: {reason};')
  assert '\n' not in str(error.value)


def test_an_array_in_a_line_is_a_bad_row_wherever_it_is(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'[1]\n{json.dumps(PAIR)}\n')
  rows, bad = sources.load(path)
  assert (len(rows), bad) == (1, {'not an object': 1})


def test_prompts_without_response_only_when_asked(tmp_path):
  path = write(tmp_path / 'a.jsonl', {'instruction': 'x', 'output': ''}, PAIR)
  rows, bad = sources.load(path)
  assert (len(rows), bad) == (1, {'empty response': 1})
  rows, bad = sources.load(path, need_response=False)
  assert ([r.references for r in rows], bad) == ([(), ('3',)], {})


def test_a_line_separator_inside_text_is_not_a_line(tmp_path):
  record = {'instruction': 'a\u2028b\u0085c', 'output': 'd'}
  path = tmp_path / 'a.jsonl'
  path.write_bytes(
    b'\xef\xbb\xbf' + json.dumps(record, ensure_ascii=False).encode() + b'\r\n'
  )
  rows, bad = sources.load(path, on_bad_row='fail')
  assert (rows[0].instruction, bad) == ('a\u2028b\u0085c', {})


def write_arrow(path, table):
  import pyarrow

  with (
    pyarrow.OSFile(str(path), 'wb') as file,
    pyarrow.ipc.new_stream(file, table.schema) as stream,
  ):
    stream.write_table(table)


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
  import pyarrow
  import pyarrow.parquet

  records = [{**PAIR, 'output': [f'{n}', 'or this']} for n in 'abc']
  lines = '\n'.join(map(json.dumps, records))
  array = json.dumps(records, indent=2)
  (tmp_path / 'a.jsonl').write_text(lines)
  (tmp_path / 'b.json').write_text(f'\n {array}')
  (tmp_path / 'c.json').write_text(lines)
  (tmp_path / 'd.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
  (tmp_path / 'e.json.gz').write_bytes(gzip.compress(array.encode()))
  table = pyarrow.Table.from_pylist(records)
  pyarrow.parquet.write_table(table, tmp_path / 'f.parquet')
  write_arrow(tmp_path / 'g.arrow', table)
  (tmp_path / 'README.md').write_text('not data')
  (tmp_path / '.hidden.json').write_text('not data')

  def texts(rows):
    return [(r.instruction, r.input, r.references) for r in rows]

  expected = [('Add.', '1 2', (n, 'or this')) for n in 'abc']
  files = sorted(tmp_path.glob('[a-g].*'))
  assert len(files) == 7
  for file in files:
    rows, bad = sources.load(file, on_bad_row='fail')
    assert (texts(rows), bad) == (expected, {}), file
  assert rows[2].where == f'{tmp_path}/g.arrow[2]'
  rows, bad = sources.load(tmp_path)
  assert (texts(rows), bad) == (expected * 7, {})
  assert texts(sources.load([files[0], files[1]])[0]) == expected * 2


@pytest.mark.parametrize(
  ('name', 'content', 'expected'),
  [
    ('none.jsonl', None, 'no such file'),
    ('empty.jsonl', b'', 'no usable row (it is empty)'),
    ('empty.json', b'[]', 'no usable row (it is empty)'),
    ('bad.jsonl', b'x\ny', 'no usable row (2 not JSON)'),
    ('bad.json', b'[{"instruction": ', 'not a JSON array'),
    ('bad.jsonl.gz', b'not gzip', 'cannot read it'),
    ('cut.jsonl.gz', gzip.compress(b'x' * 999, mtime=0)[:-9], 'cannot read it'),
    ('bad.parquet', b'not Parquet', 'cannot read it'),
    ('bad.arrow', b'not Arrow', 'cannot read it'),
    ('bad.csv', b'a,b', 'unknown kind of file'),
  ],
)
def test_unusable_files_fail_in_one_line(tmp_path, name, content, expected):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError) as error:
    sources.load(path)
  message = str(error.value)
  assert message.startswith(f'{path}: ')
  assert expected in message
  assert '\n' not in message


def test_unusable_specs_fail(tmp_path):
  with pytest.raises(UserError, match='no data file here'):
    sources.load(tmp_path)
  with pytest.raises(UserError, match='at least one'):
    sources.load([])
  with pytest.raises(UserError, match="use 'skip' or 'fail'"):
    sources.load(tmp_path, on_bad_row='drop')


METADATA = (
  *('dataset_info.json', 'dataset_infos.json', 'README.md', '.x/a.jsonl'),
)


@pytest.mark.parametrize(
  ('names', 'kept'),
  [
    (['train.jsonl', 'test.jsonl'], ['train.jsonl']),
    (['my_train.jsonl', 'my-dev.json', 'eval.jsonl'], ['my_train.jsonl']),
    (
      [f'data/{x}-0000{i}-of-00002.jsonl' for x in 'ab' for i in (0, 1)],
      [f'data/{x}-0000{i}-of-00002.jsonl' for x in 'ab' for i in (0, 1)],
    ),
    (
      ['data/train-0-of-2.jsonl', 'data/train-1-of-2.jsonl', 'data/val-0.json'],
      ['data/train-0-of-2.jsonl', 'data/train-1-of-2.jsonl'],
    ),
    (['train/0.jsonl', 'validation/0.jsonl'], ['train/0.jsonl']),
    # Nothing to tell apart.
    (['test.jsonl'], ['test.jsonl']),
    (['a.jsonl', 'train.jsonl'], ['a.jsonl', 'train.jsonl']),
    (['latest.jsonl', 'contrain.jsonl'], ['contrain.jsonl', 'latest.jsonl']),
    # What to take is the user's to say.
    (['dev.jsonl', 'test.jsonl'], 'several splits (dev.jsonl, test.jsonl)'),
    (['a.jsonl', 'test.jsonl'], 'several splits (a.jsonl, test.jsonl)'),
    (['main/train-0.json', 'other/train-0.json'], 'in main, other; name one'),
    (
      [f'data/{x}-0-of-1.json' for x in ('train_sft', 'train_gen', 'test_gen')],
      'several training sets (train_gen, train_sft); name the files',
    ),
    (['train.jsonl', 'train_small.jsonl'], 'sets (train, train_small)'),
    (
      ['train-0-of-2-0ab.jsonl', 'train-1-of-2-f9c.jsonl', 'test-0-of-1.jsonl'],
      ['train-0-of-2-0ab.jsonl', 'train-1-of-2-f9c.jsonl'],
    ),
  ],
)
def test_a_directory_gives_what_is_trained_on(tmp_path, names, kept):
  for name in (*names, *METADATA):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, {'instruction': name, 'output': 'x'})
  if isinstance(kept, str):
    with pytest.raises(UserError) as error:
      sources.load(tmp_path)
    assert kept in str(error.value)
  else:
    rows, bad = sources.load(tmp_path)
    assert ([row.instruction for row in rows], bad) == (kept, {})


def saved(path, *records):
  """What `Dataset.save_to_disk` writes, and what an earlier one left."""
  import pyarrow

  path.mkdir(parents=True)
  names = [f'data-{i}.arrow' for i in range(len(records))]
  for name, record in zip([*names, 'old.arrow'], [*records, PAIR], strict=True):
    write_arrow(path / name, pyarrow.Table.from_pylist([record]))
  listed = [{'filename': name} for name in names]
  (path / 'state.json').write_text(json.dumps({'_data_files': listed}))
  (path / 'dataset_info.json').write_text('{}')


def test_a_set_that_was_saved_to_disk(tmp_path):
  records = [{'instruction': x, 'output': 'y'} for x in 'ab']
  saved(tmp_path / 'one', *records)
  rows, bad = sources.load(tmp_path / 'one')
  assert ([row.instruction for row in rows], bad) == (['a', 'b'], {})
  splits = tmp_path / 'splits'
  saved(splits / 'test', records[1])
  saved(splits / 'dev', records[1])
  (splits / 'dataset_dict.json').write_text('{"splits": ["test", "dev"]}')
  with pytest.raises(UserError, match=f'none is train; name .* {splits}/dev$'):
    sources.load(splits)
  saved(splits / 'train', records[0])
  assert [row.instruction for row in sources.load(splits)[0]] == ['a']
  assert [row.instruction for row in sources.load(splits / 'test')[0]] == ['b']
  (splits / 'train' / 'state.json').write_text('{}')
  with pytest.raises(UserError, match=r'state\.json: not what save_to_disk'):
    sources.load(splits)


@pytest.mark.parametrize(
  ('spec', 'config', 'revision', 'split'),
  [
    ('org/some-data', None, None, 'train'),
    ('org/some-data:test', None, None, 'test'),
    ('org/some-data/main', 'main', None, 'train'),
    ('org/some-data/3.0.0:test', '3.0.0', None, 'test'),
    ('org/some-data@v1.1:test', None, 'v1.1', 'test'),
    ('org/some-data/main@refs/pr/1:dev', 'main', 'refs/pr/1', 'dev'),
  ],
)
def test_hub_id_loads_what_it_names(monkeypatch, spec, config, revision, split):
  datasets = pytest.importorskip('datasets')
  asked = []

  def load_dataset(path, name=None, *, split, revision=None):
    asked.append((path, name, revision, split))
    return datasets.Dataset.from_list([PAIR, {**PAIR, 'input': None}])

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  rows, _ = sources.load(spec)
  assert [row.input for row in rows] == ['1 2', '']
  assert rows[1].where == f'{spec}[1]'
  assert asked == [('org/some-data', config, revision, split)]


def test_hub_failure_is_one_line(monkeypatch, tmp_path):
  datasets = pytest.importorskip('datasets')

  def load_dataset(*args, **kwargs):
    raise ValueError('Config name is missing.\nPick one: a, b\nand more')

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError) as error:
    sources.load('org/name')
  message = str(error.value)
  assert 'ValueError: Config name is missing. Pick one: a, b)' in message
  assert 'org/name[/config]' in message
  assert '\n' not in message
  # Beside a directory that is there, a misspelt one is not asked the hub for.
  (tmp_path / 'data' / 'rows').mkdir(parents=True)
  with pytest.raises(UserError, match='no such file or directory'):
    sources.load('data/rows/tets')


def test_a_function_gives_rows():
  rows, bad = sources.load('python:tools.synthetic:rows:train:3:7')
  assert (len(rows), bad) == (3, {})
  assert rows == sources.load('python:tools.synthetic:rows:train:3:7')[0]
  assert rows[0].where == 'python:tools.synthetic:rows:train:3:7[0]'
  zero, _ = sources.load('python:tools.synthetic:rows:train:3')
  assert [r.instruction for r in zero] == [
    r.instruction
    for r in sources.load('python:tools.synthetic:rows:train:3:0')[0]
  ]
  for bad, why in (
    ('tools.synthetic:rows:train', 'TypeError: .*missing 1 required'),
    ('tools.synthetic:rows:other:3', "ValueError: split 'other'"),
    ('tools.synthetic:lines:3', 'AttributeError: .*lines'),
    ('tools.nothing:rows', 'ModuleNotFoundError'),
    ('tools', 'ValueError: not enough values'),
  ):
    with pytest.raises(UserError, match=f'{why}.*; expected python:<module>'):
      sources.load(f'python:{bad}')


def test_what_a_function_says_to_its_user_is_all(tmp_path, monkeypatch):
  (tmp_path / 'lacking.py').write_text(
    'from gakd_jax import UserError\n\n'
    "def rows():\n  raise UserError('fetch it')\n\n"
    'def later():\n  yield from rows()\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  for name in ('rows', 'later'):
    with pytest.raises(UserError, match=r'^fetch it$'):
      sources.load(f'python:lacking:{name}')


@pytest.mark.parametrize(
  ('path', 'count', 'references'),
  [
    ('dolly/dev.jsonl', 1000, 1),
    ('dolly/test.jsonl', 500, 1),
    ('vicuna', 80, 1),
    ('sinst_11/test.jsonl', 1694, 20),
    ('gsm8k/test.jsonl', 1319, 1),
    ('llm_adapters/dataset/AQuA/test.json', 254, 1),
    ('llm_adapters/dataset/mawps/test.json', 238, 1),
    ('dialogsum/dialogsum.test.jsonl', 500, 3),
    ('dialogsum/dialogsum.dev.jsonl', 500, 1),
  ],
)
def test_real_files(shared_dir, path, count, references):
  rows, bad = sources.load(shared_dir / 'data' / path, on_bad_row='fail')
  assert (len(rows), bad) == (count, {})
  assert max(len(row.references) for row in rows) == references
  # The rendered prompt that some of these files hold is never the instruction.
  assert not any('### Response:' in row.instruction for row in rows)
