"""tools/prepare_data.py: files in, rows that the loader reads out."""

import json
import os

import pytest

from gakd_jax.data import sources
from gakd_jax.evals import tasks
from tools import prepare_data


def test_rows_come_back_as_they_were(tmp_path, capsys):
  source, made = tmp_path / 'a.json', tmp_path / 'data' / 'a.jsonl'
  records = [
    {'instruction': 'Add.', 'input': '1 1', 'output': '2', 'answer': '2.0'},
    {'instruction': 'Say.', 'output': ['a', 'b']},
    {'dialogue': 'A: Hi', 'summary1': 'a', 'summary2': 'b'},
    {
      'messages': [
        {'role': 'system', 'content': 'Be brief.'},
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'content': 'Ho'},
      ]
    },
    {
      'instruction': 'Say.',
      'output': ['a', 'b'],
      'system': 'Be brief.',
      'history': [['Hi', 'Ho']],
      'answer': 'a',
    },
    {
      'messages': [
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'content': 'Bad.', 'weight': 0},
        {'role': 'user', 'content': 'And now?'},
        {'role': 'assistant', 'content': 'Good.', 'weight': 1},
      ]
    },
    {'instruction': '', 'output': 'x'},
    {'instruction': 'x', 'output': 'y', 'answer': '\ud800'},
    {'instruction': 'x', 'output': 'y', 'images': ['a.png']},
  ]
  source.write_text(json.dumps(records))
  assert prepare_data.main([str(source), str(made)]) == 0
  assert (
    '6 rows, 1 skipped: empty prompt, 1 skipped: has images, which no template '
    'shows, 1 skipped: not UTF-8\n'
  ) in capsys.readouterr().out

  def of(path):
    rules = sources.Rules('skip', True, 'all')
    return [
      (r.instruction, r.input, r.references, r.messages, r.answer)
      for _, _, r in sources.stream(str(path), rules)
      if isinstance(r, sources.Row)
    ]

  assert not any('Bad.' in x[2] for x in of(source))

  assert of(made) == of(source)


def test_translations_of_two_texts(tmp_path, capsys):
  one, other, made = (tmp_path / x for x in ('a.ne', 'a.en', 'a.jsonl'))
  one.write_text('\ufeffएक\r\nदुई\n\n', 'utf-8', newline='')
  other.write_text('one\ntwo\n\n')
  arguments = [str(one), str(made), f'--target={other}']
  assert prepare_data.main([*arguments, '--languages=Nepali,English']) == 0
  first, second = sources.load(str(made))[0]
  assert first.instruction == (
    'Translate the following Nepali text into English.'
  )
  assert (first.input, first.references) == ('एक', ('one',))
  assert second.input == 'दुई'
  capsys.readouterr()
  assert prepare_data.main(arguments) == 2
  assert '--languages: name two' in capsys.readouterr().err
  other.write_bytes(b'caf\xe9\n')
  assert prepare_data.main([*arguments, '--languages=Nepali,English']) == 2
  assert 'a.en: not UTF-8' in capsys.readouterr().err
  other.write_text('one\n')
  assert prepare_data.main([*arguments, '--languages=Nepali,English']) == 2
  assert 'a.ne has 3 lines and' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('source', 'file', 'options', 'said'),
  [
    ('pipe.jsonl', 'b.jsonl', [], 'pipe.jsonl: it is a pipe or device'),
    ('none.jsonl', 'b.jsonl', [], 'none.jsonl: no such file'),
    ('bad.jsonl', 'b.jsonl', [], 'no usable row (1 not JSON)'),
    ('a.jsonl', 'b.parquet', [], 'name a file to write that ends in .jsonl'),
    ('a.jsonl', 'folder.jsonl', [], 'name a file to write that ends in'),
    ('a.jsonl', 'a.jsonl/b.jsonl', [], "File exists: 'a.jsonl'"),
    ('pipe.jsonl', 'b.jsonl', ['--target=a.jsonl'], 'it is a pipe or device'),
    ('a.jsonl', 'b.jsonl', ['--target=pipe.jsonl'], 'it is a pipe or device'),
    ('a.jsonl', 'b.jsonl', ['--target=none'], 'none: it is not there; name a'),
    ('a.jsonl', 'b.jsonl', ['--target=.'], '.: it is a directory; name a file'),
    (
      'a.jsonl',
      'b.jsonl',
      ['--target=a.jsonl', '--languages=,'],
      '--languages: name two',
    ),
    ('a.jsonl', 'b.jsonl', ['--languages=a,b'], 'of --target; name both'),
  ],
)
def test_what_cannot_be_prepared_leaves_nothing(
  tmp_path, monkeypatch, capsys, source, file, options, said
):
  monkeypatch.chdir(tmp_path)
  os.mkfifo('pipe.jsonl')
  (tmp_path / 'a.jsonl').write_text('{"prompt": "a", "response": "b"}')
  (tmp_path / 'bad.jsonl').write_text('{')
  (tmp_path / 'folder.jsonl').mkdir()
  before = sorted(tmp_path.rglob('*'))
  if any('target' in x for x in options) and 'languages' not in options[-1]:
    options = [*options, '--languages=a,b']
  assert prepare_data.main([source, file, *options]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert said in error
  assert sorted(tmp_path.rglob('*')) == before


def test_a_part_of_a_file(tmp_path, capsys):
  source, made = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'
  rows = [{'question': f'{i}?', 'answer': f'#### {i}'} for i in range(7)]
  rows.insert(1, {'question': 'What?', 'answer': ''})
  source.write_text('\n'.join(map(json.dumps, rows)))

  def prepare(*options):
    status = prepare_data.main([str(source), str(made), *options])
    return status, capsys.readouterr()

  for options, kept in (
    ([], range(7)),
    (['--limit=3'], range(3)),
    (['--skip=5'], range(5, 7)),
    (['--skip=2', '--limit=2'], range(2, 4)),
    (['--limit=8'], range(7)),
  ):
    status, said = prepare(*options)
    assert status == 0
    found = [row.references[0] for row in sources.load(str(made))[0]]
    assert found == [f'#### {i}' for i in kept]
    some = ' of 7' if len(kept) < 7 else ''
    counts = f'{made}: {len(kept)}{some} rows, 1 skipped: empty response\n'
    assert said.out == counts
  for options, message in (
    (['--skip=7'], f'--skip=7: {source} has 7 rows; nothing is left'),
    (['--skip=-1'], '--skip=-1 --limit=None: expected 0 or more rows to'),
    (['--limit=0'], '--skip=0 --limit=0: expected 0 or more rows to'),
  ):
    status, said = prepare(*options)
    assert status == 2
    assert said.err.startswith(f'error: {message}')


def test_real_translations(shared_dir):
  folder = shared_dir / 'data/flores_v1'
  rows = prepare_data.translations(
    folder / 'wikipedia.test.ne-en.ne',
    folder / 'wikipedia.test.ne-en.en',
    ('Nepali', 'English'),
  )
  assert len(rows) > 2500
  assert rows[0].references == (
    'If the research problem is not clear then review of literature can help '
    'focus on the problem.',
  )


@pytest.mark.parametrize(
  ('file', 'rows', 'references', 'task'),
  [
    ('gsm8k/train.jsonl', 7473, 1, 'gsm8k'),
    ('gsm8k/test.jsonl', 1319, 1, 'gsm8k'),
    ('dialogsum/dialogsum.dev.jsonl', 500, 1, 'summary'),
    ('dialogsum/dialogsum.test.jsonl', 500, 3, 'summary'),
    ('llm_adapters/ft-training_set/math_data.json', 3260, 1, 'math'),
  ],
)
def test_public_files_as_they_are(
  shared_dir, tmp_path, file, rows, references, task
):
  made = tmp_path / 'made.jsonl'
  assert prepare_data.main([str(shared_dir / 'data' / file), str(made)]) == 0
  found, bad = sources.load(str(made))
  assert (len(found), bad) == (rows, {})
  assert {len(row.references) for row in found} == {references}
  # Each can be scored, and its own reference is right.
  row = found[-1]
  assert tasks.score(task, row, row.references[0])[tasks.TASKS[task].scores[0]]
