"""Answers that end at stop strings."""

import dataclasses
import json
import sys

import pytest

from gakd_jax import UserError, models, partial, sharding
from gakd_jax.data import sources
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import evaluator, generation, scores, tasks
from gakd_jax.models import pair

# What the model writes, the answer that is left of it, and where it was cut.
WRITTEN = [
  ('The sum is 4 \n\nQuestion: and 3+3?\n\n6', 'The sum is 4', '\n\n'),
  ('It is 5. Question: 3+3?\n\n6', 'It is 5.', 'Question:'),
  ('\n\nsix\nor so', 'six\nor so', None),
  ('<think>a\n\nb</think>\n\nseven', 'seven', None),
  ('Question: why?', '', 'Question:'),
]
ROWS = tuple(
  sources.Row('How much?', references=(text,), where='f')
  for text in ('The sum is 4', 'It is 5.', 'six or so', 'seven', 'nothing')
)
STOP = ('\n\n', 'Question:')


@pytest.fixture
def run(tiny_model_dir, tmp_path, monkeypatch):
  """Evaluates a model that writes `WRITTEN`; identity None: in training."""
  path = tiny_model_dir()
  tokenizer = tokenizer_lib.load(path)
  both, params = pair.make(
    models.load(path), None, dtype='float32', tokenizers=[tokenizer]
  )

  def run(identity=None, **settings):
    subject = evaluator.Subject(
      models=both,
      template='chat',
      max_length=64,
      max_prompt_length=48,
      head_chunk=8,
      mesh=sharding.make_mesh(data=1),
      workdir=tmp_path,
      identity=identity,
    )
    settings = {'rows': ROWS, 'seeds': (0,)} | settings
    made = generation.Generation('set', **settings)
    return made.run(subject, params, 0)['metrics']

  def stream(model, prompts, **settings):
    del model
    end = settings['eos_ids'][:1] if settings['keep_end'] else ()
    for i in range(len(prompts)):
      ids = tokenizer.encode(WRITTEN[i][0], add_special_tokens=False)
      yield [i], [[*ids, *end] if i == 2 else ids]

  monkeypatch.setattr(generation.streaming, 'stream', stream)
  run.tokens = lambda text: len(tokenizer.encode(text))
  run.text, run.ids = tokenizer.decode, tokenizer.encode
  run.answers = lambda seed=0: [
    json.loads(line)
    for line in (
      (tmp_path / f'answers/set-{seed}.jsonl').read_text().splitlines()
    )
  ]
  return run


@pytest.mark.parametrize('identity', [None, 'of these weights'])
def test_an_answer_ends_before_the_first_stop_string(run, identity):
  most = run.tokens(WRITTEN[3][0])  # As many as the first has, or fewer.
  assert run.tokens(WRITTEN[0][0]) >= most > run.tokens(WRITTEN[2][0])
  result = run(identity, stop=STOP, max_new_tokens=most)
  lines = run.answers()
  assert [line['answer'] for line in lines] == [text for _, text, _ in WRITTEN]
  assert [line.get('cut_at') for line in lines] == [x for *_, x in WRITTEN]
  for line, (written, text, cut_at) in zip(lines, WRITTEN, strict=True):
    assert line['tokens'] == run.tokens(written if cut_at is None else text)
    ids = run.ids(written, add_special_tokens=False)
    if cut_at is None:
      ends = line['ids'][len(ids) :]
      assert line['ids'][: len(ids)] == ids
      assert len(ends) == (written == WRITTEN[2][0])
    else:
      assert line['ids'] == ids[: line['tokens']]
      assert run.text(line['ids']).strip() == text
  # What is scored is what was kept.
  assert [line['scores']['rouge_l'] for line in lines] == [100] * 4 + [0]
  assert result['rouge_l']['mean'] == pytest.approx(80)
  assert result['corpus_bleu']['mean'] == pytest.approx(
    scores.corpus_bleu(
      [text for _, text, _ in WRITTEN], [row.references for row in ROWS]
    )
  )
  assert result['unfinished']['mean'] == pytest.approx(20)  # The fourth alone.


def test_without_stop_strings_nothing_is_cut(run):
  run()
  lines = run.answers()
  assert lines[0]['answer'] == WRITTEN[0][0]
  assert not any('cut_at' in line for line in lines)


def test_one_seed_has_an_error_and_several_pass(run, monkeypatch):
  wrong = tuple(dataclasses.replace(row, references=('9',)) for row in ROWS)
  result = run(rows=wrong, task='math')
  accuracy = result['accuracy']
  assert accuracy['mean'] == accuracy['stderr'] == 0
  rows = (dataclasses.replace(ROWS[0], references=('4',)), *wrong[1:])
  result = run(rows=rows, task='math')
  accuracy = result['accuracy']
  assert accuracy['mean'] == pytest.approx(20)
  assert accuracy['stderr'] == pytest.approx(20)
  assert 'std' not in accuracy
  assert not any(key.startswith('pass_at') for key in result)
  written = iter([WRITTEN, WRITTEN[::-1], WRITTEN[::-1]])
  stream = generation.streaming.stream

  def other(*args, **settings):
    monkeypatch.setattr(sys.modules[__name__], 'WRITTEN', next(written))
    yield from stream(*args, **settings)

  monkeypatch.setattr(generation.streaming, 'stream', other)
  result = run(rows=rows, task='math', seeds=(1, 2, 3))
  accuracy = result['accuracy']
  assert accuracy['mean'] == pytest.approx(100 / 15)
  assert accuracy['by_seed'] == {'1': 20, '2': 0, '3': 0}
  assert accuracy['std'] == pytest.approx(20 / 3**0.5)
  # Of the rows, the first is right once in three.
  assert accuracy['stderr'] == pytest.approx(100 / 15)
  (by_length,) = accuracy['by_length'].values()
  assert by_length == {k: accuracy[k] for k in ('mean', 'std', 'by_seed')}
  assert result['pass_at_2']['mean'] == pytest.approx(100 * (2 / 3) / 5)
  assert result['pass_at_3']['mean'] == pytest.approx(20)


def share_of_words(row, answer):
  """How many words of the reference, and of another, an answer has."""
  words = row.references[0].split()
  if words == ['nothing']:
    words = ['Question:', 'absent']
  return sum(word in answer for word in words) / len(words)


def refuses(row, answer):
  raise KeyError(answer)


def test_a_function_says_how_right_an_answer_is(run, monkeypatch):
  check = f'python:{__name__}:share_of_words'
  result = run(check=check)
  want = [
    100 * share_of_words(r, w[0]) for r, w in zip(ROWS, WRITTEN, strict=True)
  ]
  assert [x['scores']['accuracy'] for x in run.answers()] == want
  assert result['accuracy']['mean'] == pytest.approx(sum(want) / 5)
  assert 'stderr' in result['accuracy']
  assert 'rouge_l' in result
  several = run(check=check, seeds=(0, 1))
  # Half right, as the last is, is not right.
  right = sum(x == 100 for x in want)
  assert want[-1] == 50
  assert several['pass_at_2']['mean'] == pytest.approx(20 * right)
  assert right == 4
  made = generation.Generation('set', ROWS, check=check, seeds=(0, 1))
  assert set(made.metrics(False)) == set(several)
  assert made.scores[0] == 'accuracy'  # by which models are compared


def test_a_check_that_is_none_is_refused_before_the_work(run):
  for check, said in (
    ('python:no_such:check', 'ModuleNotFoundError'),
    (f'python:{__name__}:absent', 'AttributeError'),
    (f'{__name__}:run', 'expected python:<module>:<function>'),
  ):
    with pytest.raises(UserError, match=said):
      generation.Generation('set', ROWS, check=check)
  known = f'python:{__name__}:share_of_words'
  rows = (dataclasses.replace(ROWS[0], references=('4',)),)
  with pytest.raises(UserError, match="'math' has its own"):
    generation.Generation('set', rows, task='math', check=known)
  with pytest.raises(UserError, match='refuses: KeyError'):
    run(check=f'python:{__name__}:refuses')


def test_answers_to_one_prompt_are_compared_with_each_other(run, monkeypatch):
  assert 'distinct_2_of_prompt' not in run()
  same = run(seeds=(0, 1))['distinct_2_of_prompt']['mean']
  written = iter([WRITTEN, WRITTEN[::-1]])
  stream = generation.streaming.stream

  def other(*args, **settings):
    monkeypatch.setattr(sys.modules[__name__], 'WRITTEN', next(written))
    yield from stream(*args, **settings)

  monkeypatch.setattr(generation.streaming, 'stream', other)
  result = run(seeds=(0, 1), stop=())
  texts = [
    [line['answer'] for line in lines]
    for lines in zip(run.answers(0), run.answers(1), strict=True)
  ]
  assert len({*map(tuple, texts)}) == 5
  want = sum(map(scores.distinct_2, texts)) / 5
  assert result['distinct_2_of_prompt']['mean'] == pytest.approx(want)
  assert same < result['distinct_2_of_prompt']['mean']


def test_a_task_has_stop_strings_unless_others_are_given(run):
  rows = tuple(dataclasses.replace(x, references=('#### 6',)) for x in ROWS)
  run(rows=rows, task='lm_eval_gsm8k')
  cut = [line.get('cut_at') for line in run.answers()]
  assert cut == ['Question:', 'Question:', None, None, 'Question:']
  run(rows=rows, task='lm_eval_gsm8k', stop=())
  assert not any('cut_at' in line for line in run.answers())


def test_examples_of_a_task_stand_before_its_prompts(run, monkeypatch):
  rows = tuple(dataclasses.replace(x, references=('6',)) for x in ROWS)
  few_shot = tasks.TASKS['gsm8k_few_shot']
  with pytest.raises(UserError, match=r'take \d+ tokens, and .*length is 48;'):
    run(rows=rows, task='gsm8k_few_shot')
  short = dataclasses.replace(few_shot, examples=(('one?', 'yes'),))
  monkeypatch.setitem(tasks.TASKS, 'gsm8k_few_shot', short)
  seen = []
  stream = generation.streaming.stream

  def watched(model, prompts, **settings):
    seen.extend(prompts)
    return stream(model, prompts, **settings)

  monkeypatch.setattr(generation.streaming, 'stream', watched)
  run(rows=rows, task='gsm8k_few_shot')
  for ids in seen:
    text = run.text(ids)
    assert text.index('one?') < text.index('yes') < text.index('How much?')
    assert 'Q:' not in text  # They are turns.


def test_answers_cut_elsewhere_are_not_gone_on_with(run, monkeypatch):
  append = partial.Partial.append

  def dying(self, lines):
    append(self, lines)
    raise KeyboardInterrupt

  monkeypatch.setattr(partial.Partial, 'append', dying)
  with pytest.raises(KeyboardInterrupt):
    run('weights', stop=STOP)
  monkeypatch.setattr(partial.Partial, 'append', append)
  with pytest.raises(UserError, match=r'stop was .* and is \[\]'):
    run('weights')


@pytest.mark.parametrize('stop', ['', ('a', ''), (3,)])
def test_stop_is_a_tuple_of_texts(stop):
  with pytest.raises(
    UserError, match=r'set\.stop=.*: expected a tuple, each a'
  ):
    evaluator.check({'set': {'kind': 'generation', 'stop': stop}})


def test_keys_and_values_are_in_int8_if_asked(run, monkeypatch):
  kinds = []
  stream = generation.streaming.stream

  def watched(model, *args, **settings):
    kinds.append(model.cache_kind)
    return stream(model, *args, **settings)

  monkeypatch.setattr(generation.streaming, 'stream', watched)
  run()
  run(cache='int8')
  assert kinds == [None, 'int8']
