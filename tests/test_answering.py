import dataclasses
import json
import types

import pytest

from configs import base
from gakd_jax import (
  UserError,
  answering,
  inputs,
  models,
  rollout,
  streaming,
)
from gakd_jax.data import sources
from gakd_jax.data import tokenizer as tokenizers
from gakd_jax.models import decoding, pair

TURNS = (
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': 'Why?'},
)
ROWS = [
  sources.Row('Say hi.', references=('hi', 'hello')),
  sources.Row('Name a bird that swims,\u2028and one that does not.', 'Here.'),
  sources.Row('Why?', messages=TURNS, references=('so',)),
  sources.Row('Repeat one.'),
  sources.Row('Repeat two.'),
]
SETTINGS = {
  'source': {'model': 'tiny', 'data': 'rows'},
  'template': 'chat',
  'max_prompt_length': 64,
  'seed': 3,
  'max_new_tokens': 12,
  'batch_size': 3,
}


@pytest.fixture(scope='module')
def subject(tiny_model_dir):
  path = tiny_model_dir()
  return models.load(path), tokenizers.load(path)


def write(subject, path, rows=ROWS, **settings):
  """Writes the file; unfinished answers too, since most of them are."""
  settings = SETTINGS | {'keep_unfinished': True} | settings
  own = {f.name for f in dataclasses.fields(rollout.Teacher)}
  writer = rollout.Teacher(**{k: settings.pop(k) for k in own & set(settings)})
  model, tokenizer = subject
  left_out = answering.write(
    writer, decoding.unstack(model), tokenizer, rows, path, **settings
  )
  lines = path.read_text(encoding='utf-8').split('\n')[:-1]
  return [json.loads(line) for line in lines], left_out


def kill_after(monkeypatch, batches, write, *args, **settings):
  """Calls `write`, which dies when it has written so many batches."""
  stream = streaming.stream

  def dying(*args, **kwargs):
    for n, batch in enumerate(stream(*args, **kwargs)):
      if n == batches:
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(streaming, 'stream', dying)
    with pytest.raises(KeyboardInterrupt):
      write(*args, **settings)


def fake_stream(monkeypatch, responses):
  def stream(model, prompts, **settings):
    yield list(range(len(prompts))), responses

  monkeypatch.setattr(streaming, 'stream', stream)


@pytest.mark.slow
def test_killed_and_started_again_the_file_is_the_same(
  subject, tmp_path, monkeypatch
):
  whole, path = tmp_path / 'whole.jsonl', tmp_path / 'out' / 'killed.jsonl'
  partial = path.with_name('killed.jsonl.partial')
  write(subject, whole, samples=2)
  assert [p.name for p in tmp_path.iterdir()] == ['whole.jsonl']
  for batches in (0, 1, 2):
    kill_after(monkeypatch, batches, write, subject, path, samples=2)
    assert not path.exists()
    if batches == 1:
      content = partial.read_bytes()
      assert content.count(b'\n') == 1 + 3, 'settings and one batch'
      partial.write_bytes(content[:-9])  # Killed while it wrote the batch.
    elif batches == 2:
      content = partial.read_bytes()
      kept = content.count(b'\n') - 1
      partial.write_bytes(content + content.splitlines()[-1][:40])
  decoded = []
  stream = streaming.stream

  def watched(*args, **kwargs):
    for rows, responses in stream(*args, **kwargs):
      decoded.extend(rows)
      yield rows, responses

  monkeypatch.setattr(streaming, 'stream', watched)
  write(subject, path, samples=2)
  assert 3 <= kept < len(decoded) + kept == 2 * len(ROWS)
  assert path.read_bytes() == whole.read_bytes()
  assert [p.name for p in path.parent.iterdir()] == ['killed.jsonl']


def test_an_answer_depends_on_seed_row_and_number_alone(subject, tmp_path):
  lines, _ = write(subject, tmp_path / 'three', samples=3)
  assert [line['sample'] for line in lines] == [0, 1, 2] * len(ROWS)
  first = [line for line in lines if line['sample'] == 0]
  assert write(subject, tmp_path / 'one')[0] == first
  fewer, _ = write(subject, tmp_path / 'fewer', ROWS[:2], samples=3)
  assert fewer == lines[:6]
  wide, _ = write(subject, tmp_path / 'wide', samples=3, batch_size=32)
  assert wide == lines
  others, _ = write(subject, tmp_path / 'others', seed=4)
  assert others != first
  for r in (0, 3, 4):
    assert len({line['output'] for line in lines[3 * r : 3 * r + 3]}) == 3


def test_each_line_says_what_it_is(subject, tmp_path, monkeypatch):
  tokenizer = subject[1]
  texts = ['hi', 'teacher', 'so', 'the', 'answer']
  fake_stream(
    monkeypatch,
    [tokenizer.encode(text, add_special_tokens=False) for text in texts],
  )
  path = tmp_path / 'answers.jsonl'
  lines, left_out = write(subject, path, keep_unfinished=False)
  assert not left_out
  tokens = [line.pop('tokens') for line in lines]
  assert tokens == [len(tokenizer.encode(text)) for text in texts]
  same = {'sample': 0, 'finished': True}
  answer_turn = {'role': 'assistant', 'content': 'so'}
  assert lines[0] == {
    'instruction': 'Say hi.',
    'input': '',
    'output': 'hi',
    'rouge_l': 100.0,
    **same,
  }
  assert lines[1] == {
    'instruction': ROWS[1].instruction,
    'input': 'Here.',
    'output': 'teacher',
    **same,
  }
  assert lines[2] == {
    'messages': [*TURNS, answer_turn],
    'rouge_l': 100.0,
    **same,
  }
  rows, bad = sources.load(path)
  assert not bad
  assert [row.references for row in rows] == [(text,) for text in texts]
  assert [row.messages for row in rows] == [row.messages for row in ROWS]


def test_what_is_cut_off_or_empty_is_left_out_and_counted(
  subject, tmp_path, monkeypatch, capsys
):
  word = subject[1].encode('the', add_special_tokens=False)
  cut = (word * 12)[:12]
  blank = subject[1].encode(' ', add_special_tokens=False)
  fake_stream(monkeypatch, [cut, word, cut, [], blank])
  path = tmp_path / 'some'
  lines, left_out = write(subject, path, keep_unfinished=False)
  assert [line['output'] for line in lines] == ['the']
  assert left_out == {'unfinished': 2, 'empty': 2}
  said = 'answers: 1 to 5 prompts; 2 left out: empty; 2 left out: unfinished\n'
  assert said in capsys.readouterr().out
  lines, left_out = write(subject, tmp_path / 'all')
  assert [line['finished'] for line in lines] == [
    False,
    True,
    False,
    True,
    True,
  ]
  assert not left_out
  fake_stream(monkeypatch, [cut] * 5)
  with pytest.raises(UserError, match='none of 5 answers ended within'):
    write(subject, tmp_path / 'none', keep_unfinished=False)


def test_rows_that_the_template_cannot_hold_are_skipped_or_fatal(
  subject, tmp_path
):
  lines, left_out = write(subject, tmp_path / 'out', template='raw')
  assert [line['instruction'] for line in lines] == [
    row.instruction for row in ROWS if not row.messages
  ]
  assert list(left_out.values()) == [1]
  with pytest.raises(UserError, match='one user turn only'):
    write(subject, tmp_path / 'no', template='raw', on_bad_row='fail')
  with pytest.raises(UserError, match="no usable row for template 'raw': 1 "):
    write(subject, tmp_path / 'no', [ROWS[2]], template='raw')


@pytest.mark.parametrize(
  ('rows', 'settings', 'message'),
  [
    (ROWS, {'temperature': 0.5}, r'temperature was 1\.0 and is 0\.5'),
    (ROWS, {'batch_size': 4}, 'batch_size was 3 and is 4'),
    (ROWS, {'source': {'model': 'x', 'data': 'rows'}}, 'model was'),
    (ROWS[1:], {}, 'rows was'),
  ],
)
def test_other_settings_do_not_go_on(
  subject, tmp_path, monkeypatch, rows, settings, message
):
  path = tmp_path / 'answers.jsonl'
  kill_after(monkeypatch, 1, write, subject, path)
  content = path.with_name('answers.jsonl.partial').read_bytes()
  with pytest.raises(UserError, match=message) as error:
    write(subject, path, rows, **settings)
  assert '\n' not in str(error.value)
  assert path.with_name('answers.jsonl.partial').read_bytes() == content


def test_a_file_of_somebody_else_is_not_written_to(subject, tmp_path):
  path = tmp_path / 'answers.jsonl'
  other = path.with_name('answers.jsonl.partial')
  other.write_text('{"my": "notes"}\n')
  with pytest.raises(UserError, match='move it away'):
    write(subject, path)
  assert other.read_text() == '{"my": "notes"}\n'


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'samples': 2, 'temperature': 0.0}, 'would all be the same'),
    ({'samples': 0}, r'samples=0: .* \(1 to 256\)'),
    ({'samples': 257}, r'samples=257: .* \(1 to 256\)'),
    ({'max_new_tokens': 0}, 'max_new_tokens=0'),
    ({'top_p': 1.5}, 'top_p=1.5'),
    ({'gamma': 5}, "writer 'teacher' has no setting 'gamma'; known are"),
  ],
)
def test_settings_that_make_no_sense(settings, message):
  with pytest.raises(UserError, match=message):
    rollout.make('teacher', **settings)


@pytest.mark.slow
def test_training_goes_on_with_the_teachers_answers(
  subject, tmp_path, monkeypatch
):
  """A run that is killed while the teacher writes loses one batch at most."""
  data = tmp_path / 'prompts.jsonl'
  data.write_text(''.join(f'{{"prompt": "Say {n}."}}\n' for n in range(7)))
  config = base.get_config()
  config.teacher.path = subject[0].source
  config.data.train, config.data.template = str(data), 'chat'
  config.rollout = {
    'writer': 'teacher',
    'batch_size': 2,
    'samples': 2,
    'max_new_tokens': 100,
    'cache': 'int8',
  }

  def answers(name, force=False):
    workdir = tmp_path / name
    workdir.mkdir(exist_ok=True)
    return inputs.teacher_answers(
      types.SimpleNamespace(
        config=config,
        workdir=workdir,
        readers=[(subject[1], 'chat')],
        force=force,
        writer=rollout.make(**config.rollout),
        models=pair.make(
          subject[0], subject[0], dtype='float32', tokenizers=[subject[1]] * 2
        )[0],
      )
    )

  kinds = []
  stream = streaming.stream

  def watched(model, *args, **settings):
    kinds.append(model.cache_kind)
    return stream(model, *args, **settings)

  monkeypatch.setattr(streaming, 'stream', watched)
  whole = answers('whole')
  assert kinds == ['int8']
  assert sources.load(whole)[0]
  kill_after(monkeypatch, 2, answers, 'killed')
  assert answers('killed').read_bytes() == whole.read_bytes()
  config.seed = 1
  with pytest.raises(UserError, match=r'with something else: seed was 0 and'):
    answers('killed')
  answers('killed', force=True)
  assert answers('killed').read_bytes() != whole.read_bytes()
  config.seed = 0
  monkeypatch.setattr(streaming, 'stream', None)
  assert answers('whole') == whole, 'written once'
