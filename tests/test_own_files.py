"""What a run wrote, damaged: each reader says in one line where and what."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from configs import base
from gakd_jax import (
  UserError,
  answering,
  best,
  binary,
  evaluate,
  fingerprint,
  log,
  page,
  partial,
  rundir,
  train,
)
from gakd_jax.evals import answers, generation
from tests.written import write_results

pytestmark = pytest.mark.slow  # Many.

ANSWER = {
  'index': 0,
  'step': 1,
  'instruction': 'q',
  'input': '',
  'references': ['a'],
  'answer': 'b',
  'tokens': 1,
  'ids': [1],
  'scores': {'rouge_l': 1.0},
}
ROLLOUT = {
  'step': 0,
  'index': 0,
  'instruction': 'i',
  'input': '',
  'pieces': [['a', False]],
  'tokens': 1,
  'finished': True,
}
SPEED = {'gen-0': {'tokens_per_second': 1.0, 'seconds': 1.0, 'padding': 0.0}}
COMPARISON = {'set': 's', 'metric': 'm', 'a': 'a', 'b': 'b'}
COMPARISON |= dict.fromkeys(('difference', 'low', 'high', 'p'), 0.5)
RECORD = {'template': 'chat', 'recipe': 'r', 'seed': 0, 'step': 3}
METRICS = {'step': 1, 'train/loss': 1.0, 'loss/ce': None}


def lines(*rows):
  return ''.join(json.dumps(row) + '\n' for row in rows).encode()


GEN = generation.Generation('gen', (None, None))  # of two rows
# {file: (what it holds, who reads it)}
FILES = {
  'results.json': (None, rundir.read_results),
  'config.json': (lines({'config': {'seed': 0}}), rundir.read_config),
  'metrics.jsonl': (lines(METRICS, METRICS), log.read_metrics),
  'rollouts.jsonl': (lines(ROLLOUT, ROLLOUT), rundir.read_rollouts),
  'answers/gen-0.jsonl': (
    lines(ANSWER, ANSWER),
    lambda run: answers.read(run, GEN, 0),
  ),
  'speed.json': (lines(SPEED), rundir.read_speed),
  'comparisons.json': (lines([COMPARISON]), rundir.read_comparisons),
  'gakd_jax.json': (lines(RECORD), best.read),
}
DAMAGES = {
  'half': lambda whole: whole[: len(whole) // 2 - 3],
  'a number': lambda _: b'3\n',
  'a text': lambda _: b'"x"\n',
  'null': lambda _: b'null\n',
  'a list of numbers': lambda _: b'[1, 2]\n',
  'binary': lambda _: b'\x00\xff\xfe\x80\n',
  'UTF-16': lambda whole: whole.decode().encode('utf-16'),
  'a web page': lambda _: b'<html></html>\n',
  'blank lines': lambda _: b'\n\n',
  'deep': lambda _: b'[' * 100_000 + b'\n',
  'of another kind': lambda _: b'{"step": "a", "best": 3, "config": 4}\n',
  'not a number': lambda _: b'NaN\n',
}


@pytest.fixture
def run(tmp_path):
  """A directory with all that a run leaves."""
  write_results(tmp_path, {'loss/ce': 1.5})
  for name, (content, _) in FILES.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if content is not None:
      (tmp_path / name).write_bytes(content)
  return tmp_path


def refusal(read, *arguments):
  with pytest.raises(UserError) as error:
    read(*arguments)
  text = str(error.value)
  assert '\n' not in text
  assert len(text) < 700
  return text


def test_whole_files_are_read_and_have_a_page(run):
  for _, read in FILES.values():
    assert read(run)
  page.write(run / 'report.html', {'a': run})


@pytest.mark.parametrize('name', FILES)
def test_a_directory_in_its_place(run, name):
  (run / name).unlink()
  (run / name).mkdir()
  _, read = FILES[name]
  with pytest.raises((UserError, IsADirectoryError), match=name):
    read(run)


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_one_line(run, name, damage):
  file = run / name
  file.write_bytes(damage(file.read_bytes()))
  if name == 'metrics.jsonl' and b'\n' not in file.read_bytes():
    return  # A process that was killed may have left half a line.
  _, read = FILES[name]
  assert str(file) in refusal(read, run)


@pytest.mark.parametrize('name', ['results.json', 'gakd_jax.json'])
def test_an_empty_file_is_one_line(run, name):
  (run / name).write_bytes(b'')
  assert name in refusal(FILES[name][1], run)


def test_answers_that_are_not_there_are_one_line(run):
  (run / 'answers' / 'gen-0.jsonl').write_bytes(b'')
  assert 'empty, or not there' in refusal(answers.read, run, GEN, 0)
  (run / 'answers' / 'gen-0.jsonl').write_bytes(lines(ANSWER))
  assert 'has 1 answers to 2 rows' in refusal(answers.read, run, GEN, 0)
  assert 'was not evaluated' in refusal(answers.read, run, GEN, 1)


WRONG = {
  'results.json': [
    *[(('step',), x) for x in ('x', 1.5, [], True)],
    *[(('seed',), x) for x in ('x', [3])],
    *[(('recipe',), x) for x in (3, [], {})],
    *[(('is_teacher',), x) for x in (3, 'x', None)],
    *[(('averages',), x) for x in (None, 3, [3], {'a': 3}, {'a': [3]})],
    *[(('peak_memory_gb',), x) for x in ('x', [], True)],
    *[(('best',), x) for x in (None, 3, [], {}, {'evaluators': 3})],
    *[(('last',), x) for x in (None, {'evaluators': []})],
    *[(('best', 'evaluators', 'loss'), x) for x in (None, 3, {}, [])],
    *[(('best', 'evaluators', 'loss', 'metrics'), x) for x in (None, 3, [])],
    *[
      (('best', 'evaluators', 'loss', 'metrics', 'ce'), x)
      for x in (None, 3, {}, [], {'mean': 'x'}, {'mean': True}, {'std': 1})
    ],
    *[
      (('best', 'evaluators', 'loss', 'metrics', 'ce', 'by_length'), x)
      for x in (None, 3, {'0-10': {}}, {'0-10': 3})
    ],
  ],
  'metrics.jsonl': [
    *[(('step',), x) for x in ('x', None, 1.5, [])],
    *[(('train/loss',), x) for x in ('x', [], [1], {}, True)],
  ],
  'rollouts.jsonl': [
    *[(('step',), x) for x in ('x', None)],
    *[(('pieces',), x) for x in (None, 3, [3], [['a']], [[3, True]], {})],
    *[(('instruction',), x) for x in (None, 3)],
    (('finished',), 1),
    (('tokens',), None),
  ],
  'answers/gen-0.jsonl': [
    *[(('answer',), x) for x in (None, 3, [])],
    *[(('instruction',), x) for x in (None, 3)],
    *[(('references',), x) for x in (None, 'a', [3], {})],
    *[(('scores',), x) for x in (None, 3, [], {'a': 'x'}, {'a': []})],
    *[(('ids',), x) for x in (None, 3, ['a'], [1.5], {})],
    *[(('index',), x) for x in (None, 'x')],
    *[(('tokens',), x) for x in (None, 'x')],
  ],
  'speed.json': [
    *[(('gen-0',), x) for x in (None, 3, {}, [])],
    *[(('gen-0', 'seconds'), x) for x in (None, 'x', [])],
  ],
  'config.json': [(('config',), x) for x in (None, 3, 'x', [])],
  'gakd_jax.json': [
    *[(('template',), x) for x in (None, 3, '')],
    *[(('step',), x) for x in (None, 'x')],
    *[(('seed',), x) for x in (None, 1.5)],
    (('recipe',), []),
  ],
}


@pytest.mark.parametrize(
  ('name', 'path', 'value'),
  [(name, *case) for name, cases in WRONG.items() for case in cases],
  ids=str,
)
def test_a_wrong_value_is_one_line(run, name, path, value):
  first, _, rest = (run / name).read_bytes().partition(b'\n')
  *parts, last = path
  row = part = json.loads(first)
  for key in parts:
    part = part[key]
  part[last] = value
  (run / name).write_bytes(lines(row) + rest)
  text = refusal(FILES[name][1], run)
  assert str(run / name) in text
  if name != 'speed.json':
    assert last in text


@pytest.mark.parametrize(
  'value', [3, None, {}, COMPARISON | {'p': 'x'}, {'a': 1}], ids=str
)
def test_a_comparison_of_another_kind(run, value):
  (run / 'comparisons.json').write_bytes(lines([value]))
  assert 'comparisons.json: 0' in refusal(rundir.read_comparisons, run)


def test_a_comparison_with_a_model_of_no_number(run):
  found = COMPARISON | dict.fromkeys(('difference', 'low', 'high', 'p'))
  (run / 'comparisons.json').write_bytes(lines([found]))
  assert rundir.read_comparisons(run) == [found]


@pytest.mark.parametrize(
  'content',
  [b'', b'[]', b'{"a"', b'3', b'\xff', b'{}', b'{"model_type": "qwen3"}'],
  ids=str,
)
def test_a_run_is_not_begun_over_something_else(tmp_path, content):
  """Over a model's config.json, say."""
  file = tmp_path / 'config.json'
  file.write_bytes(content)
  text = refusal(lambda: fingerprint.begin(tmp_path, config={'seed': 0}))
  assert text.startswith(f'{file}: not ')
  assert file.read_bytes() == content


def repr_of(x):
  return x.__module__ if callable(x) else str(x)


KEPT = {
  'generation': (
    generation._taken,
    {'index': 0, 'answer': 'a', 'tokens': 1, 'ids': [1]},
    [3, [], {}, {'index': 'a'}, {'index': 0, 'answer': 3}, None, 'x'],
  ),
  'answering': (
    answering._taken,
    [0, None, {'sample': 0, 'finished': True, 'tokens': 1, 'output': 'a'}],
    [3, [], {}, [0, None], [0, None, 3], ['a', None, {}], None, [0, 3, {}]],
  ),
}


@pytest.mark.parametrize(
  ('take', 'good', 'bad'),
  [(take, good, bad) for take, good, wrong in KEPT.values() for bad in wrong],
  ids=repr_of,
)
def test_what_was_kept_of_another_kind(tmp_path, take, good, bad):
  file = tmp_path / 'a.partial'
  kept = partial.Partial(file, {'seed': 0})
  kept.append([good])
  assert [*kept.read(take)] == [0]
  kept.append([bad])
  assert 'a.partial: is not what an interr' in refusal(kept.read, take)


@pytest.mark.parametrize(
  'first', [b'3', b'{}', b'[]', b'{"settings": 3}', b'\xff', b'x', b'[' * 10**5]
)
def test_what_was_kept_begins_otherwise(tmp_path, first):
  (tmp_path / 'a.partial').write_bytes(first + b'\n')
  kept = partial.Partial(tmp_path / 'a.partial', {'seed': 0})
  assert 'is not what an interrupted' in refusal(kept.read, tuple)


def test_a_device_is_no_file_to_write(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for place in (tmp_path, tmp_path / 'pipe'):
    text = refusal(log.write_atomically, place, 'a')
    assert text == f'{place}: there is something else than a file; name another'


def places(folder):
  """{what it is: a path at which no directory can be}."""
  (folder / 'file').touch()
  (folder / 'dangling').symlink_to(folder / 'nowhere')
  (folder / 'loop').symlink_to(folder / 'loop')
  os.mkfifo(folder / 'pipe')
  return {
    'a file': folder / 'file',
    'below a file': folder / 'file' / 'a',
    'far below a file': folder / 'file' / 'a' / 'b',
    'a dangling link': folder / 'dangling',
    'a loop': folder / 'loop',
    'below a loop': folder / 'loop' / 'a',
    'a pipe': folder / 'pipe',
    'below a pipe': folder / 'pipe' / 'a',
    'a long name': folder / ('a' * 300),
    'a long path': folder / ('a/' * 3000),
    'with null': folder / 'a\0b',
  }


PLACES = places(Path(tempfile.mkdtemp()))


@pytest.mark.parametrize('place', PLACES.values(), ids=PLACES)
@pytest.mark.parametrize('program', ['train', 'evaluate'])
def test_a_workdir_that_cannot_be(place, program, capsys):
  config = base.get_config()
  config.student.path, config.train.steps = 'no/such/model', 3
  run = {
    'train': lambda argv: train.run(config, place),
    'evaluate': lambda argv: evaluate.run(config, ['no/such/model'], place),
  }[program]
  with pytest.raises(SystemExit) as stopped:
    binary.guarded(run, ['x'])
  assert stopped.value.code == 2
  text = capsys.readouterr().err
  assert text.startswith('error: ')
  assert text.count('\n') == 1
  assert 'name another' in text


@pytest.mark.parametrize(
  'place', [x for x in PLACES if x.startswith('below') or 'long' in x]
)
def test_a_page_that_cannot_be(run, place, capsys):
  output = PLACES[place] / 'page.html'
  with pytest.raises(SystemExit) as stopped:
    binary.guarded(lambda argv: page.write(output, {'a': run}), ['x'])
  assert stopped.value.code == 2
  text = capsys.readouterr().err
  assert text.startswith('error: ')
  assert text.endswith('; mend that, or name another place\n')
  assert text.count('\n') == 1
