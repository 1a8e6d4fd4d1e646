"""Held-out loss, fidelity and multiple choice against full logits."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax import UserError, models, sharding
from gakd_jax.data import encoding, sources
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import (
  comet,
  encoded,
  evaluator,
  fidelity,
  generation,
  loss,
  multiple_choice,
  tasks,
)
from gakd_jax.models import pair

ROWS = tuple(
  sources.Row(f'Say {text}.', references=(text,), where=f'f:{i}')
  for i, text in enumerate(['yes', 'no', 'the answer', 'a teacher shows', 'x'])
)


@pytest.fixture(scope='module')
def paths(tiny_model_dir):
  return tiny_model_dir(seed=0), tiny_model_dir(seed=1, width=48)


@pytest.fixture(scope='module')
def parts(paths):
  """A subject, its parameters, and both models as functions of ids."""
  student, teacher = map(models.load, paths)
  both, params = pair.make(
    student,
    teacher,
    dtype='float32',
    tokenizers=[tokenizer_lib.load(path) for path in paths],
  )
  subject = evaluator.Subject(
    models=both,
    template='chat',
    max_length=64,
    max_prompt_length=48,
    head_chunk=7,
    mesh=sharding.make_mesh(data=1),
    workdir=None,
  )
  return subject, params, student, teacher


def log_probs(model, prompt, response):
  """[len(response), V] of all tokens: one row, no chunks, no padding."""
  ids = jnp.array([[*prompt, *response]])
  # Of 304 rows, the last four are no tokens.
  z_TV = model.logits(ids)[0, len(prompt) - 1 : -1, :300]
  return np.asarray(jax.nn.log_softmax(z_TV), np.float64)


def mean(x):
  return x['mean'] if isinstance(x, dict) else x


def flat(metrics):
  return {key: mean(x) for key, x in metrics.items()}


def gaps(q, targets):
  """Of each bin: its share times (confidence less correctness)."""
  confidence, right = q.max(1), q.argmax(1) == targets
  bins = np.minimum((15 * confidence).astype(int), 14)
  return np.bincount(bins, confidence - right) / len(bins)


@pytest.mark.slow
def test_loss_is_what_full_logits_give(parts):
  subject, params, student, teacher = parts
  log_p, log_q, targets = [], [], []
  long = dataclasses.replace(ROWS[0], references=('the answer ' * 5,))
  rows = (*ROWS, long)
  for row in rows:
    ids = encoding.encode(subject.models.tokenizer, row, 'chat')
    log_q.append(log_probs(student, *ids))
    log_p.append(log_probs(teacher, *ids))
    targets += ids[1]
  p, q = np.exp(np.concatenate(log_p)), np.exp(np.concatenate(log_q))
  m, at = (p + q) / 2, np.arange(len(targets))
  expected = {
    'ce': -np.log(q[at, targets]).mean(),
    'forward_kl': np.sum(p * np.log(p / q), 1).mean(),
    'reverse_kl': np.sum(q * np.log(q / p), 1).mean(),
    'jsd': np.sum(p * np.log(p / m) + q * np.log(q / m), 1).mean() / 2,
    'agreement': np.mean(p.argmax(1) == q.argmax(1)),
    'ece': np.abs(gaps(q, targets)).sum(),
  }
  made = loss.Loss('loss', rows, batch_size=3)
  found = made.run(subject, params, 0)['metrics']
  by_position = found['reverse_kl']['by_position']
  assert flat(found) == pytest.approx(expected, rel=2e-4)
  reverse_N = np.sum(q * np.log(q / p), 1)
  position_N = np.concatenate([1 + np.arange(len(x)) for x in log_q])
  for bucket, first, last in (('1-8', 1, 8), ('9-16', 9, 16)):
    inside = (first <= position_N) & (position_N <= last)
    assert inside.any()
    assert by_position[bucket]['mean'] == pytest.approx(
      reverse_N[inside].mean(), rel=2e-4
    )
  # Of each text, over their mean length; in the order of the rows.
  row_N = np.repeat(np.arange(len(rows)), [len(x) for x in log_q])
  for name, loss_N in (
    ('ce', -np.log(q[at, targets])),
    ('reverse_kl', reverse_N),
  ):
    sum_R = np.bincount(row_N, loss_N)
    assert found[name]['by_row'] == pytest.approx(
      sum_R * len(rows) / len(row_N), rel=2e-4
    )


def test_what_one_bin_is_too_sure_of_makes_up_for_no_other(parts, monkeypatch):
  subject, params, *_ = parts
  monkeypatch.setattr(
    loss,
    '_overconfidence',
    lambda _, targets_N: jnp.where(
      targets_N[:, None] == 5, jnp.array([0.5, 0.0]), jnp.array([0.0, -0.5])
    ),
  )
  loss._sums.clear_cache()
  found = loss.measure(subject, params, [([7], [5, 6, 5, 6])], 1)
  loss._sums.clear_cache()
  assert found['ece'] == pytest.approx(0.5)


def test_confidence_that_is_right_half_of_the_time_is_off_by_half():
  log_q_NV = jnp.log(jnp.array([[0.98, 0.02]] * 10))
  targets_N = jnp.array([0, 1] * 5)
  off_NK = loss._overconfidence(log_q_NV, targets_N)
  assert off_NK.shape == (10, 15)
  total_K = np.sum(off_NK, axis=0)
  assert total_K[14] == pytest.approx(10 * 0.48)
  assert not total_K[:14].any()


@pytest.mark.slow
def test_a_mesh_measures_the_same(parts, paths):
  subject, params, *_ = parts
  made = loss.Loss('loss', ROWS, 4)
  alone = made.run(subject, params, 0)['metrics']
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    student, teacher = (models.load(p, mesh=mesh) for p in paths)
    both, params = pair.make(
      student,
      teacher,
      dtype='float32',
      tokenizers=subject.models.tokenizers,
    )
    there = dataclasses.replace(subject, mesh=mesh, models=both)
    found = made.run(there, params, 0)['metrics']
    choices = multiple_choice.MultipleChoice('x', CHOICES)
    prompts = encoded.encode(there, CHOICES).prompts
    means = choices._scores(there, params, prompts)
  assert flat(found) == pytest.approx(flat(alone), rel=1e-4)
  for name in loss.LOSSES:
    expected = pytest.approx(alone[name]['by_row'], rel=1e-4)
    assert found[name]['by_row'] == expected
  params = parts[1]
  expected = choices._scores(subject, params, prompts)
  assert means == pytest.approx(expected, rel=1e-4)


CHOICES = tuple(
  sources.Row(
    f'Which is {word}?\n\nAnswer1: the teacher shows Answer2: \xe9 '
    'Answer3: answer assistant\n\nAnswer format: answer1/answer2/answer3',
    references=(f'the correct answer is answer{1 + i % 3}',),
    answer=f'answer{1 + i % 3}',
    where=f'f:{i}',
  )
  for i, word in enumerate(['red', 'blue', 'tall'])
)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('candidates', 'normalise'),
  [
    ('text', 'tokens'),
    ('label', 'tokens'),
    ('text', 'bytes'),
    ('text', 'none'),
  ],
)
def test_the_option_with_the_highest_log_probability(
  parts, tmp_path, candidates, normalise
):
  subject, params, student, _ = parts
  subject = dataclasses.replace(
    subject, workdir=tmp_path, max_prompt_length=99, max_length=150
  )
  choices = multiple_choice.MultipleChoice(
    'set', CHOICES, candidates, normalise, batch_size=4
  )
  result = choices.run(subject, params, 3)['metrics']
  lines = (tmp_path / 'answers' / 'set-0.jsonl').read_text().splitlines()
  right = 0
  texts = ['the teacher shows', '\xe9', 'answer assistant']
  if candidates == 'label':
    texts = [f'the correct answer is answer{i}' for i in (1, 2, 3)]
  for row, line in zip(CHOICES, map(json.loads, lines), strict=True):
    prompt = encoding.encode(subject.models.tokenizer, row, 'chat')[0]
    means = []
    for text in texts:
      ids = subject.models.tokenizer.encode(text, add_special_tokens=False)
      log_q = log_probs(student, prompt, ids)
      length = {'tokens': len(ids), 'bytes': len(text) + ('\xe9' in text)}
      total = np.sum(log_q[np.arange(len(ids)), ids])
      means.append(total / length.get(normalise, 1))
    assert list(line['log_probs'].values()) == pytest.approx(means, rel=1e-4)
    best = int(np.argmax(means))
    assert line['extracted'] == f'answer{best + 1}'
    assert line['answer'] == texts[best]
    assert line['gold'] == row.answer
    right += line['extracted'] == row.answer
    assert line['scores'] == {
      'accuracy': 100.0 * (f'answer{best + 1}' == row.answer)
    }
  share = right / 3
  assert result == {
    'accuracy': {
      'mean': pytest.approx(100 * share),
      'stderr': pytest.approx(100 * (share * (1 - share) / 2) ** 0.5),
    }
  }


def test_options_beyond_learned_positions_are_refused(parts, tmp_path):
  subject, params, *_ = parts
  config = dataclasses.replace(
    subject.models.student_config, learned_positions=True, max_length=9
  )
  subject = dataclasses.replace(
    subject,
    workdir=tmp_path,
    models=dataclasses.replace(subject.models, student_config=config),
  )
  choices = multiple_choice.MultipleChoice('set', CHOICES)
  with pytest.raises(UserError, match='tokens, and the model has learned only'):
    choices.run(subject, params, 0)


def test_a_model_that_says_nan_is_wrong(parts, tmp_path, monkeypatch):
  subject, params, *_ = parts
  subject = dataclasses.replace(subject, workdir=tmp_path)
  choices = multiple_choice.MultipleChoice('set', CHOICES)
  monkeypatch.setattr(
    multiple_choice.MultipleChoice,
    '_scores',
    lambda *_: [-1.0, float('nan'), float('-inf')] * 3,
  )
  found = choices.run(subject, params, 0)['metrics']
  assert found['accuracy']['mean'] == 0
  text = (tmp_path / 'answers' / 'set-0.jsonl').read_text()
  for line in text.splitlines():
    found = json.loads(line, parse_constant=pytest.fail)
    assert found['extracted'] is None
    assert [*found['log_probs'].values()] == [-1.0, None, None]


def write_answers(path, name, answers_by_seed, ids_of=None):
  for seed, answers in answers_by_seed.items():
    file = path / 'answers' / f'{name}-{seed}.jsonl'
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
      {
        'instruction': '',
        'answer': x,
        'input': 'src',
        'references': ['ref', 'other'],
      }
      for x in answers
    ]
    if ids_of:
      lines = [line | {'ids': ids_of(line['answer'])} for line in lines]
    file.write_text(''.join(json.dumps(x) + '\n' for x in lines))


def test_fidelity_on_three_texts(parts, tmp_path):
  subject, params, *_ = parts
  rows = tuple(
    dataclasses.replace(row, references=(f'{i}',)) for i, row in enumerate(ROWS)
  )
  of = generation.Generation('sums', rows, task='math', seeds=(1, 2))
  mine = {1: ['0', '1', 'is 2.0', 'none', ''], 2: ['0', '1', '2', '3', '4']}
  theirs = {1: ['0', '7', 'or 2', 'none', '4'], 2: ['0', '1', '2', '3', '9']}

  def ended(text):
    row = dataclasses.replace(ROWS[0], references=(text,))
    return encoding.encode(subject.models.tokenizer, row, 'chat')[1]

  write_answers(tmp_path / 'student', 'sums', mine, ended)
  write_answers(tmp_path / 'teacher', 'sums', theirs, ended)
  subject = dataclasses.replace(
    subject,
    workdir=tmp_path / 'student',
    teacher_workdir=tmp_path / 'teacher',
  )
  compared = fidelity.Fidelity('fidelity', of)
  result = compared.run(subject, params, 0)['metrics']
  # Of five, 0 and 2 agree for the first seed: two "none" agree on nothing.
  agreement = result['answer_agreement']
  assert agreement['mean'] == pytest.approx((40 + 80) / 2)
  assert agreement['by_seed'] == {'1': 40, '2': 80}
  for text, answers in (
    ('gold', [row.references[0] for row in rows]),
    ('student', mine[1]),
    ('teacher', theirs[1]),
  ):
    texts = [
      dataclasses.replace(row, references=(answer,))
      for row, answer in zip(rows, answers, strict=True)
    ]
    expected = loss.Loss('x', texts).run(subject, params, 0)['metrics']
    for key, value in flat(expected).items():
      assert mean(result[f'{key}_{text}']) == pytest.approx(value, rel=1e-5)
  assert result['ce_gold'] != result['ce_teacher']
  # A sum over each answer: of all of them, as many tokens as they have.
  nats = result['sequence_kl_student']
  assert nats['by_seed'].keys() == {'1', '2'}
  tokens = sum(len(ended(text)) for text in mine[1]) / len(mine[1])
  assert nats['by_seed']['1'] == pytest.approx(
    tokens * result['reverse_kl_student']['mean'], rel=1e-6
  )
  assert nats['by_seed']['2'] != nats['by_seed']['1']

  alone = dataclasses.replace(subject, teacher_workdir=None)
  found = compared.run(alone, params, 0)['metrics']
  assert found.keys() == {k for k in result if k.endswith(('gold', 'student'))}
  assert found.keys() == {*compared.metrics(has_teacher=True)}
  nobody = dataclasses.replace(subject, models=subject.models.alone())
  assert compared.run(nobody, params, 0) == {'metrics': {}}
  assert not compared.metrics(has_teacher=False)
  lost = dataclasses.replace(subject, teacher_workdir=tmp_path)
  with pytest.raises(UserError, match="'sums' was not evaluated"):
    fidelity.Fidelity('fidelity', of).run(lost, params, 0)


@pytest.mark.slow
def test_fidelity_is_of_the_ids_that_were_written(parts, tmp_path):
  subject, params, student, _ = parts
  subject = dataclasses.replace(subject, workdir=tmp_path)
  prompts = [
    encoding.encode(subject.models.tokenizer, row, 'chat')[0] for row in ROWS
  ]
  room = subject.max_length - len(prompts[3])
  # Not as the tokenizer has them, cut off, of nothing, and too long.
  written = {'a': [70, 71, 72], 'b': [80], 'c': [], 'd': [90] * 99, 'e': [5, 6]}
  write_answers(tmp_path, 'set', {0: [*written]}, written.get)
  of = generation.Generation('set', ROWS, seeds=(0,))
  compared = fidelity.Fidelity('fidelity', of, 2)
  found = compared.run(subject, params, 0)['metrics']
  ce = []
  for prompt, ids in zip(prompts, written.values(), strict=True):
    ids = ids[:room]
    log_q = log_probs(student, prompt, ids) if ids else None
    ce.append([-log_q[n, i] for n, i in enumerate(ids)])
  tokens = np.concatenate(ce)
  by_row = [sum(row) * 4 / len(tokens) if row else None for row in ce]
  assert by_row[2] is None
  assert found['ce_student']['mean'] == pytest.approx(tokens.mean(), rel=2e-4)
  found_by_row = np.array(found['ce_student']['by_row'], float)
  np.testing.assert_allclose(found_by_row, np.array(by_row, float), rtol=2e-4)

  write_answers(tmp_path, 'set', {0: [*written]}, lambda text: [])
  compared = fidelity.Fidelity('fidelity', of, 2)
  found = compared.run(subject, params, 0)['metrics']
  assert 'ce_gold' in found
  assert all(key.endswith('_gold') for key in found)
  write_answers(tmp_path, 'set', {0: [*written]})
  with pytest.raises(UserError, match="fidelity: the answers to 'set' have no"):
    fidelity.Fidelity('fidelity', of, 2).run(subject, params, 0)


def test_agreement_of_whole_texts_is_exact_match():
  of = generation.Generation('dolly', ROWS)
  compared = fidelity.Fidelity('fidelity', of)._compare(
    ['Yes!', 'no', 'a b c d', '', 'x'], ['yes', 'on', 'a b c d', '', 'y']
  )
  assert compared['answer_agreement'] == 40
  assert compared['rationale_rouge_l'] == 40
  assert compared['rationale_bleu'] == pytest.approx(20)  # It heeds case.


def test_comet_is_asked_with_source_answer_and_first_reference(
  monkeypatch, tmp_path
):
  asked = []

  class Model:
    def predict(self, texts, batch_size, gpus):
      asked.append(texts)
      return types.SimpleNamespace(system_score=0.5 + 0.1 * len(asked))

  package = types.SimpleNamespace(
    download_model=lambda name: f'/cache/{name}',
    load_from_checkpoint=lambda path: Model(),
  )
  monkeypatch.setitem(sys.modules, 'comet', package)
  row = ROWS[:1]
  of = generation.Generation('flores', row, task='translation', seeds=(1, 2))
  write_answers(tmp_path, 'flores', {1: ['a'], 2: ['b']})
  subject = types.SimpleNamespace(workdir=tmp_path)
  result = comet.Comet('comet', of).run(subject, None, 0)['metrics']['comet']
  assert result['mean'] == pytest.approx(65)
  assert asked[1] == [{'src': 'src', 'mt': 'b', 'ref': 'ref'}]
  monkeypatch.setitem(sys.modules, 'comet', None)
  with pytest.raises(UserError, match=r"pip install 'gakd_jax\[comet\]'"):
    comet.Comet('comet', of)


@pytest.mark.parametrize(
  ('evals', 'message'),
  [
    ({'fidelity': {}}, '`of` is missing'),
    ({'fidelity': {'of': 'dolly'}}, "of='dolly' is no evaluator of kind"),
    ({'loss': {}, 'fidelity': {'of': 'loss'}}, "of='loss' is no evaluator"),
    ({'x': {'kind': 'lost'}}, "kind='lost': did you mean 'loss'"),
    ({'generation': {'task': 'maths'}}, "task='maths': did you mean 'math'"),
    ({'loss': {'batch_size': 'all'}}, "batch_size='all': expected a whole num"),
    *(
      ({'multiple_choice': {x: 'letters'}}, f"{x}='letters': expected one of")
      for x in ('candidates', 'normalise')
    ),
    ({'loss': {'limit': 0}}, r'loss\.limit=0: expected .* \(1 or more'),
    ({'loss': {'every': 1.5}}, 'every=1.5: expected a whole number'),
    ({'generation': {'seeds': ('a',)}}, 'seeds=.*: expected .* a whole number'),
    (
      {'generation': {}, 'fidelity': {'of': 'generation', 'limit': 3}},
      "no setting 'limit'",
    ),
  ],
)
def test_wrong_settings_are_one_line(evals, message):
  with pytest.raises(UserError, match=message):
    evaluator.make(evals, 'python:tools.synthetic:rows:test:3', tuple)


@pytest.fixture
def refusing(tiny_tokenizer_dir):
  """-> (template, tokenizer) of models, each of which refuses a letter."""

  def of(letter):
    tokenizer = tokenizer_lib.load(tiny_tokenizer_dir)
    tokenizer.chat_template = (
      f"{{% if '{letter}' in messages[0].content %}}"
      f"{{{{ raise_exception('no {letter}') }}}}{{% endif %}}"
      '{{ messages[0].content }}'
    )
    return 'chat', tokenizer

  return lambda letters: [of(letter) for letter in letters]


LINES = {
  'generation': {},
  'loss': {},
  'choice': {'kind': 'multiple_choice', 'limit': 2},
}


@pytest.fixture
def mixed(tmp_path):
  """A file of six rows, two of which templates may refuse, and one is bad."""
  path = tmp_path / 'mixed.jsonl'
  ask = '{}\n\nAnswer format: a/b'
  rows = [{'instruction': ask.format(x), 'output': 'a'} for x in 'uvxyz']
  rows.insert(1, {'instruction': 'v', 'output': ''})
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def test_rows_that_a_template_refuses_are_left_out_for_all(
  mixed, refusing, capsys
):
  made = evaluator.make(LINES, mixed, lambda: refusing('ux'))
  said = capsys.readouterr().out.splitlines()
  for name, asked in (('generation', 'vyz'), ('loss', 'vyz'), ('choice', 'vy')):
    assert [row.instruction[0] for row in made[name].rows] == [*asked]
    assert sum(made[name].about['dropped'].values()) == 3
    for reason in ('chat template says: no u', 'no x', 'empty response'):
      (line,) = [x for x in said if x.startswith(name) and x.endswith(reason)]
      assert line.startswith(f'{name}: 1 rows skipped: ')


def test_a_row_that_a_template_refuses_stops_if_it_is_to(mixed, refusing):
  def make(word, lines=LINES):
    evaluator.make(lines, mixed, lambda: refusing(word), 'fail')

  with pytest.raises(UserError, match=r'mixed.jsonl:2: empty response; fix'):
    make('u')
  rows = Path(mixed).read_text().splitlines()
  Path(mixed).write_text('\n'.join([rows[0], *rows[2:]]))
  with pytest.raises(UserError, match=r'mixed.jsonl:3: the chat template says'):
    make('x')
  with pytest.raises(UserError, match='chat template says'):
    make('z')
  make('z', {'choice': LINES['choice']})  # Its first two rows are good.


def test_no_row_that_a_template_can_hold(mixed, refusing):
  with pytest.raises(UserError, match=r'config\.evals\.loss: no row of .* is'):
    evaluator.make({'loss': {}}, mixed, lambda: refusing('A'))


@pytest.mark.parametrize('kind', ['loss', 'generation', 'multiple_choice'])
def test_evaluators_of_a_set_score_the_same_rows(
  kind, parts, tmp_path, monkeypatch
):
  """Long prompts are shortened and no row is left out for its length."""
  subject, params, *_ = parts
  subject = dataclasses.replace(subject, workdir=tmp_path)
  seen = []

  def measured(subject, params, pairs, batch_size):
    seen.extend([*prompt] for prompt, _ in pairs)
    return {'ce': 1.0}

  def scored(self, subject, params, prompts):
    seen.extend([*x] for x in prompts)
    return [0.0] * 3 * len(prompts)

  def stream(model, prompts, **settings):
    seen.extend([*x] for x in prompts)
    yield [*range(len(prompts))], [[5]] * len(prompts)

  monkeypatch.setattr(loss, 'measure', measured)
  monkeypatch.setattr(multiple_choice.MultipleChoice, '_scores', scored)
  monkeypatch.setattr(generation.streaming, 'stream', stream)
  long = dataclasses.replace(
    CHOICES[0], input='long ' * 60, references=('b ' * 60,)
  )
  rows = (*CHOICES, long)
  subject = dataclasses.replace(subject, max_length=120, max_prompt_length=100)
  made = evaluator._KINDS[kind]('set', rows)
  if kind == 'generation':
    made = dataclasses.replace(made, seeds=(0,))
  found = evaluator.measure(made, subject, params, 0)
  prompts = [
    encoding.fit_prompt(subject.models.tokenizer, row, 'chat', 100)
    for row in rows
  ]
  assert len(prompts[-1]) > 95
  assert seen == prompts
  assert (found['rows'], found['shortened']) == (4, 1)
  assert found.get('truncated') == (1 if kind == 'loss' else None)


def test_what_the_template_closes_is_refused_for_all(tmp_path, bytes_tokenizer):
  """As in training, whichever evaluator it is, and before any weight."""
  path = tmp_path / 'rows.jsonl'
  rows = [
    {'instruction': f'x{i}\n\nAnswer format: a/b', 'output': text}
    for i, text in enumerate(('a', '<think>so</think>a', 'a'))
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  template = (
    '{% for m in messages %}<|s|>{{ m.content }}<|e|>{% endfor %}'
    '{% if add_generation_prompt %}<think></think>{% endif %}'
  )
  tokenizer = bytes_tokenizer(template, '<|e|>')
  made = evaluator.make(LINES, str(path), lambda: [('chat', tokenizer)])
  assert {len(x.rows) for x in made.values()} == {2}
  for x in made.values():
    ((reason, n),) = x.about['dropped'].items()
    assert ('thoughts' in reason, n) == (True, 1)
  assert len({x.about['data'] for x in made.values()}) == 1
  with pytest.raises(
    UserError, match=r'rows.jsonl:2: a response with thoughts'
  ):
    evaluator.make(LINES, str(path), lambda: [('chat', tokenizer)], 'fail')
  kept = evaluator.make(
    LINES, str(path), lambda: [('chat', tokenizer)], thinking='keep'
  )
  assert len(kept['loss'].rows) == 3


def test_metrics_are_known_before(parts, tmp_path):
  subject, params, *_ = parts
  subject = dataclasses.replace(subject, workdir=tmp_path)
  made = loss.Loss('loss', ROWS)
  for there in (
    subject,
    dataclasses.replace(subject, models=subject.models.alone()),
  ):
    has_teacher = there.models.teacher_definition is not None
    found = made.run(there, params, 0)['metrics']
    assert found.keys() == {*made.metrics(has_teacher)}
  for task in tasks.TASKS:
    evaluator.check_metric(
      f'x/{tasks.TASKS[task].scores[0]}',
      {'x': generation.Generation('x', (), task)},
      has_teacher=False,
    )
  with pytest.raises(
    UserError, match=r'are x/rouge_l, .*x/unfinished, x/distinct_2_of_prompt$'
  ):
    evaluator.check_metric(
      'x/ce', {'x': generation.Generation('x', ())}, has_teacher=True
    )


def test_greedy_sets_come_after_those_that_are_drawn():
  greedy = {'kind': 'generation', 'temperature': 0.0}
  evals = {'a': greedy, 'b': {'kind': 'generation'}, 'loss': {}}
  made = evaluator.make(evals, 'python:tools.synthetic:rows:test:3', tuple)
  assert list(made) == ['b', 'loss', 'a']


def test_what_reads_answers_comes_last():
  evals = {'a': {'kind': 'fidelity', 'of': 'b'}, 'b': {'kind': 'generation'}}
  made = evaluator.make(evals, 'python:tools.synthetic:rows:test:3', tuple)
  assert list(made) == ['b', 'a']
  assert made['a'].of is made['b']
  assert evals['a'] == {'kind': 'fidelity', 'of': 'b'}
