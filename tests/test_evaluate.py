"""The evaluation binary: models in, scores, answers and a report out."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from gakd_jax import UserError, best, evaluate, models, partial, rundir
from gakd_jax.evals import tasks
from tests.shrink import shrink

ROWS = [
  {'instruction': f'Say {word}.', 'input': '', 'output': [word, word + '!']}
  for word in ('one', 'two', 'three', 'four four', 'five', 'six', 'seven')
]
CHOICE = {
  'instruction': 'Which?\n\nAnswer1: one Answer2: two\n\n'
  'Answer format: answer1/answer2',
  'input': '',
  'output': 'the correct answer is answer2',
  'answer': 'answer2',
}
NUMBER = {'instruction': '1+1?', 'input': '', 'output': 'It is 2.'}
BY_TASK = {
  'choice': CHOICE,
  'math': NUMBER,
  'gsm8k': {'question': '1+1?', 'answer': 'So\n#### 2'},
  'aqua': NUMBER | {'answer': 'B'},
  'summary': {'dialogue': 'A: Hi', 'summary1': 'hi', 'summary2': 'hello'},
  'translation': {'instruction': 'Translate.', 'input': 'ein', 'output': 'a'},
}


@pytest.fixture(scope='module')
def write_rows(tmp_path_factory):
  def write(rows):
    path = tmp_path_factory.mktemp('data') / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)

  return write


@pytest.fixture(scope='module')
def data_file(write_rows):
  return write_rows(ROWS)


@pytest.fixture(scope='module')
def paths(tiny_model_dir, tmp_path_factory):
  """{name: model directory}, and a finished run of one of them."""
  folder = tmp_path_factory.mktemp('models')
  for seed, name in enumerate(['large', 'small']):
    tiny_model_dir(seed=seed).rename(folder / name)
  (folder / 'run').mkdir()
  tiny_model_dir(seed=2).rename(folder / 'run' / 'best')
  return {name: str(folder / name) for name in ('large', 'small', 'run')}


@pytest.fixture
def config(data_file, paths):
  c = base.get_config()
  c.teacher.path, c.teacher.dtype = paths['large'], 'float32'
  c.train.precision = 'float32'
  c.data.template = 'chat'
  c.data.max_length, c.data.max_prompt_length = 48, 32
  c.data.validation = data_file
  c.mesh.data = 1
  sampled = {'kind': 'generation', 'max_new_tokens': 6, 'batch_size': 2}
  c.evals = {
    'sampled': sampled | {'seeds': (1, 2)},
    'greedy': sampled | {'seeds': (0,), 'temperature': 0.0},
    'loss': {},
    'fidelity': {'of': 'sampled'},
  }
  return c


@pytest.fixture(scope='module')
def whole(data_file, paths, tmp_path_factory):
  """An evaluation that nothing interrupts: its directory and results."""
  workdir = tmp_path_factory.mktemp('evals') / 'whole'
  c = config.__wrapped__(data_file, paths)
  return workdir, evaluate.run(c, [paths['small'], paths['run']], workdir)


def metrics(results, *names):
  """What was measured on some sets."""
  return [results['best']['evaluators'][name]['metrics'] for name in names]


def contents(workdir):
  """{file: bytes} of all that an evaluation gives twice."""
  return {
    str(file.relative_to(workdir)): file.read_bytes()
    for file in workdir.rglob('*')
    # How fast it was is never the same, and is on the page as well.
    if file.is_file()
    and file.name not in ('speed.json', 'report.html', '.lock')
  }


def test_leaves_scores_answers_and_comparisons(whole):
  workdir, results = whole
  assert list(results) == ['large', 'small', 'run']
  answers = {
    f'answers/{x}.jsonl' for x in ('sampled-1', 'sampled-2', 'greedy-0')
  }
  files = {
    f'{model}/{file}'
    for model in results
    for file in ('results.json', 'config.json', *answers)
  }
  files |= {'table.md', 'table.tex', 'comparisons.json'}
  assert files == contents(workdir).keys()
  assert not list(workdir.rglob('*.partial'))
  for name, found in results.items():
    assert rundir.read_results(workdir / name) == found
    assert found['is_teacher'] == (name == 'large')
    assert (found['template'], found['recipe']) == ('chat', None)
    assert found['best'] == found['last']
    evaluators = found['best']['evaluators']
    assert list(evaluators) == ['loss', 'sampled', 'greedy', 'fidelity']
    assert len({x['data'] for x in evaluators.values()}) == 1
    assert {x['rows'] for x in evaluators.values()} == {len(ROWS)}
    sampled, greedy, fidelity = metrics(found, 'sampled', 'greedy', 'fidelity')
    assert sampled['rouge_l']['by_seed'].keys() == {'1', '2'}
    assert sampled['rouge_l']['std'] >= 0
    assert 'std' not in greedy['rouge_l']
    assert greedy['rouge_l']['stderr'] >= 0
    assert evaluators['greedy']['task_version'] == 1
    # The teacher is its own.
    same = fidelity['reverse_kl_gold']['mean'] == 0
    assert same == (name == 'large')
    same = fidelity['agreement_teacher']['mean'] == 1
    assert same == (name == 'large')
    assert sampled['answer_tokens']['mean'] > 0
  speed = json.loads((workdir / 'small' / 'speed.json').read_text())
  assert speed['sampled-1']['tokens_per_second'] > 0
  comparisons = json.loads((workdir / 'comparisons.json').read_text())
  losses = ('ce', 'forward_kl', 'reverse_kl')
  assert [(x['set'], x['metric'], x['a'], x['b']) for x in comparisons] == [
    (s, metric, a, b)
    for s, metric in (
      *(('loss', x) for x in losses),
      ('sampled', 'rouge_l'),
      ('greedy', 'rouge_l'),
      *(('fidelity', f'{x}_gold') for x in losses),
    )
    for b, a in (('large', 'small'), ('large', 'run'), ('small', 'run'))
  ]
  for x in comparisons:
    a, b = (
      metrics(results[x[side]], x['set'])[0][x['metric']]['mean']
      for side in ('a', 'b')
    )
    difference = a - b
    assert x['difference'] == pytest.approx(difference)
  assert 'Comparisons</h2>' in (workdir / 'report.html').read_text()


def test_what_was_not_written_at_the_end_is_made_up_for(
  whole, config, paths, tmp_path, monkeypatch
):
  """Nothing is loaded for it."""
  workdir = tmp_path / 'run'
  shutil.copytree(whole[0], workdir)
  for name in ('report.html', 'comparisons.json', 'table.md', 'table.tex'):
    (workdir / name).unlink()
  monkeypatch.setattr(models, 'load', pytest.fail)
  evaluate.run(config, [paths['small'], paths['run']], workdir)
  assert (workdir / 'report.html').exists()
  assert contents(workdir) == contents(whole[0])


def test_a_line_has_all_about_its_answer(whole):
  text = (whole[0] / 'small' / 'answers' / 'sampled-2.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [line['index'] for line in lines] == list(range(len(ROWS)))
  for line, row in zip(lines, ROWS, strict=True):
    assert line['instruction'] == row['instruction']
    assert line['references'] == row['output']
    assert line['scores'].keys() == {'rouge_l', 'bleu', 'exact_match'}
    assert 0 <= line['tokens'] <= 6


def test_killed_twice_it_is_the_same_to_the_byte(
  whole, config, paths, tmp_path, monkeypatch
):
  workdir, models = tmp_path / 'eval', [paths['small'], paths['run']]
  append = partial.Partial.append

  kept = []

  def killed_at(n):
    """Dies in the middle of writing for the n-th time."""
    calls = []

    def dying(self, lines):
      calls.append(lines)
      append(self, lines)
      kept.append(len(lines))
      if len(calls) == n:
        size = self._path.stat().st_size
        os.truncate(self._path, size - 7)
        kept.append(-1)
        raise KeyboardInterrupt

    return dying

  for n in (3, 12):
    monkeypatch.setattr(partial.Partial, 'append', killed_at(n))
    with pytest.raises(KeyboardInterrupt):
      evaluate.run(config, models, workdir)
    assert list(workdir.rglob('*.partial'))
  count = []

  def counting(self, lines):
    count.append(len(lines))
    append(self, lines)

  monkeypatch.setattr(partial.Partial, 'append', counting)
  evaluate.run(config, models, workdir)
  # Seven rows, three seeds, three models: what was kept is not written again.
  assert sum(count) == 3 * 3 * 7 - sum(kept)
  assert sum(kept) > 14
  assert contents(workdir) == contents(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize('change', ['batch_size', 'mesh'])
def test_neither_batches_nor_devices_change_answers(
  whole, config, paths, tmp_path, change
):
  config.teacher.path = None
  del config.evals.loss, config.evals.fidelity
  if change == 'batch_size':
    config.evals.sampled.batch_size = 7
  else:
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
  evaluate.run(config, [paths['small']], tmp_path / 'eval')
  for name in ('sampled-1', 'sampled-2', 'greedy-0'):
    file = f'small/answers/{name}.jsonl'
    found = (tmp_path / 'eval' / file).read_text()
    assert found == (whole[0] / file).read_text()


_PROCESS = """
import sys, json
import jax

process, port, data_file, model, workdir = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{port}', 2, int(process))

from gakd_jax import evaluate
from tests.test_evaluate import config

config = config.__wrapped__(data_file, {'large': None})
config.mesh.data, config.mesh.fsdp = 2, 2
del config.evals.fidelity, config.evals.greedy
config.evals.sampled.seeds = (1,)
print(json.dumps(evaluate.run(config, [model], workdir)))
"""


@pytest.mark.slow
def test_two_processes_share_an_evaluation(
  whole, data_file, paths, tmp_path, free_port
):
  arguments = [
    str(free_port),
    data_file,
    paths['small'],
    str(tmp_path / 'eval'),
  ]
  running = [
    subprocess.Popen(
      [sys.executable, '-c', _PROCESS, str(i), *arguments],
      stdout=subprocess.PIPE,
      text=True,
      cwd=Path(__file__).parents[1],
    )
    for i in range(2)
  ]
  said = [p.communicate(timeout=120)[0] for p in running]
  assert [p.returncode for p in running] == [0, 0]
  results = [json.loads(text.splitlines()[-1])['small'] for text in said]
  assert results[0] == results[1]
  (found,), (alone,) = (
    metrics(x, 'loss') for x in (results[0], whole[1]['small'])
  )
  for key in ('ce', 'ece'):
    expected = pytest.approx(alone[key]['mean'], rel=1e-4)
    assert found[key]['mean'] == expected
  file = 'small/answers/sampled-1.jsonl'
  found = (tmp_path / 'eval' / file).read_text()
  assert found == (whole[0] / file).read_text()


def test_another_model_joins_those_that_are_there(
  config, paths, tmp_path, capsys
):
  config.teacher.path = None
  config.evals = {'greedy': config.evals.greedy.to_dict() | {'limit': 2}}
  evaluate.run(config, [paths['small']], tmp_path / 'eval')
  results = evaluate.run(
    config, [paths['small'], paths['run']], tmp_path / 'eval'
  )
  assert list(results) == ['small', 'run']
  assert 'small: has been measured' in capsys.readouterr().out


def test_other_weights_in_the_same_place_are_refused(
  config, paths, tmp_path, tiny_model_dir
):
  config.teacher.path = None
  config.evals = {'greedy': config.evals.greedy.to_dict() | {'limit': 2}}
  model = tmp_path / 'model'
  tiny_model_dir(seed=3).rename(model)
  evaluate.run(config, [model], tmp_path / 'eval')
  model.rename(tmp_path / 'before')
  tiny_model_dir(seed=4).rename(model)
  with pytest.raises(UserError, match=r'contents.--model was'):
    evaluate.run(config, [model], tmp_path / 'eval')
  # A copy is the same model.
  (tmp_path / 'before').rename(tmp_path / 'copies')
  assert evaluate.models.identity(
    tmp_path / 'copies'
  ) != evaluate.models.identity(model)


@pytest.mark.slow
def test_scores_against_a_teacher_that_was_replaced_are_refused(
  config, paths, tmp_path, tiny_model_dir
):
  config.evals = {'loss': {'limit': 2}}
  config.teacher.path = str(tmp_path / 'teacher')
  tiny_model_dir(seed=3).rename(config.teacher.path)
  evaluate.run(config, [paths['small']], tmp_path / 'eval')
  shutil.rmtree(config.teacher.path)
  tiny_model_dir(seed=4).rename(config.teacher.path)
  shutil.rmtree(tmp_path / 'eval/teacher')
  with pytest.raises(UserError, match=r'small was .*: contents.config.teacher'):
    evaluate.run(config, [paths['small']], tmp_path / 'eval')


def test_a_model_that_cannot_read_the_texts_is_refused(
  config, paths, tiny_model_dir, monkeypatch
):
  config.evals = {'loss': {'limit': 2}}
  few = tiny_model_dir(vocab_size=100)
  monkeypatch.setattr(models, 'load', lambda *_: pytest.fail('weights'))
  with pytest.raises(UserError, match='the model has only 100 embedding rows'):
    evaluate.run(config, [paths['small'], str(few)], few / 'eval')


def test_other_tokenizers_are_found_before_any_weight_is_loaded(
  config, paths, tmp_path, monkeypatch
):
  other = tmp_path / 'other'
  shutil.copytree(paths['small'], other)
  file = other / 'tokenizer.json'
  tokenizer = json.loads(file.read_text())
  vocab = tokenizer['model']['vocab']
  a, b = [*vocab][-2:]
  vocab[a], vocab[b] = vocab[b], vocab[a]
  file.write_text(json.dumps(tokenizer))
  monkeypatch.setattr(models, 'load', lambda *_: pytest.fail('weights'))
  with pytest.raises(UserError, match='have different tokenizers'):
    evaluate.run(config, [paths['small'], str(other)], tmp_path / 'eval')


def test_other_rows_rules_or_settings_are_refused_or_forced(
  config, paths, tmp_path, write_rows, monkeypatch, capsys
):
  config.teacher.path = None
  rows = write_rows(ROWS[:2])
  greedy = config.evals.greedy.to_dict()
  config.evals = {'greedy': greedy | {'data': rows}}

  def run(force=False):
    found = evaluate.run(config, [paths['small']], tmp_path, force)
    return found['small']['best']['evaluators']['greedy']

  found = run()
  assert (found['task'], found['task_version']) == ('instruct', 1)
  with monkeypatch.context() as patch:
    newer = dataclasses.replace(tasks.TASKS['instruct'], version=2)
    patch.setitem(tasks.TASKS, 'instruct', newer)
    with pytest.raises(UserError, match=r'greedy was .*version 1.*version 2'):
      run()
    assert run(force=True)['task_version'] == 2
    assert 'forced: contents.config.evals.greedy' in capsys.readouterr().out
    run()  # It is what was measured now.
    assert 'small: has been measured' in capsys.readouterr().out
  run(force=True)
  Path(rows).write_text(json.dumps(ROWS[3]) + '\n')
  with pytest.raises(UserError, match=r'evals.greedy was .* and is .*--force'):
    run()
  assert run(force=True)['rows'] == 1
  config.evals.greedy.max_new_tokens = 3
  with pytest.raises(UserError, match='max_new_tokens was 6 and is 3; go on'):
    run()
  config.evals.greedy.max_new_tokens = 6
  config.evals.greedy.batch_size = 1  # It is how, not what.
  assert run()['rows'] == 1


def test_results_of_an_earlier_version_are_said(config, paths, tmp_path):
  config.teacher.path = None
  config.evals = {'greedy': config.evals.greedy.to_dict() | {'limit': 1}}
  (tmp_path / 'small').mkdir()
  (tmp_path / 'small/results.json').write_text('{"greedy/rouge_l": 1.0}')
  with pytest.raises(UserError, match=r'results.json: of an earlier version'):
    evaluate.run(config, [paths['small']], tmp_path)


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_in_other_batches(
  config, paths, tmp_path, monkeypatch
):
  config.teacher.path = None
  config.evals = {'greedy': config.evals.greedy.to_dict()}
  append = partial.Partial.append

  def dying(self, lines):
    append(self, lines)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(partial.Partial, 'append', dying)
    with pytest.raises(KeyboardInterrupt):
      evaluate.run(config, [paths['small']], tmp_path)
  config.evals.greedy.batch_size = 3
  found = evaluate.run(config, [paths['small']], tmp_path)['small']
  assert found['best']['evaluators']['greedy']['rows'] == len(ROWS)


def test_answers_of_other_settings_are_not_gone_on_with(tmp_path):
  path = tmp_path / 'a.partial'
  partial.Partial(path, {'t': 1}).append([{'index': 0}])

  def take(line):
    return line.pop('index'), line

  assert partial.Partial(path, {'t': 1}).read(take) == {0: {}}
  with pytest.raises(UserError, match=r'a.partial was begun with .*: t was 1'):
    partial.Partial(path, {'t': 2}).read(take)
  assert partial.Partial(path, {'t': 1}, force=True).read(take) == {0: {}}
  assert partial.Partial(path, {'t': 2}, force=True).read(take) == {}
  assert partial.Partial(path, {'t': 1}).read(take) == {}
  partial.Partial(path, {'t': 1}).append([{'index': 0}])
  assert partial.Partial(tmp_path / 'none', {}).read(take) == {}
  # Not even its first line was finished.
  path.write_bytes(b'{"settings": "ab')
  assert partial.Partial(path, {'t': 1}).read(take) == {}
  partial.Partial(path, {'t': 1}).append([{'index': 1}])
  assert partial.Partial(path, {'t': 1}).read(take) == {1: {}}


def test_models_are_named_by_as_much_as_it_takes(paths, tmp_path):
  other = tmp_path / 'small'
  os.symlink(paths['small'], other)
  named = evaluate._named([paths['small'], str(other), paths['run']])
  folder = Path(paths['small']).parent.name
  assert list(named) == [
    f'{folder}-small',
    f'{tmp_path.name}-small',
    f'{folder}-run',
  ]
  assert named[f'{folder}-run'] == Path(paths['run']) / 'best'
  assert list(evaluate._named(['Qwen/Qwen3-0.6B'])) == ['Qwen3-0.6B']
  # The model of a run is named as the run, however it is spelt, and once.
  best = paths['run'] + '/best/'
  assert list(evaluate._named([best, paths['run'] + '/'])) == ['run']
  with pytest.raises(UserError, match='cannot tell'):
    evaluate._named(['nobody/model', 'nobody//model'])


def test_what_is_no_model_is_one_line(paths):
  parent = Path(paths['run']).parent
  with pytest.raises(UserError, match='neither a model nor a finished run'):
    evaluate._named([str(Path(paths['run']) / '..')])
  with pytest.raises(UserError, match='its runs are run'):
    evaluate._named([str(parent)])


SUITES = sorted(
  path.stem for path in Path(base.__file__).parent.glob('eval_*.py')
)


@pytest.mark.parametrize(
  'name',
  # Of all, each is there alone.
  [
    pytest.param(x, marks=[pytest.mark.slow] * (x == 'eval_all'))
    for x in SUITES
  ],
)
def test_every_suite_runs(name, paths, write_rows, data_file, tmp_path):
  config = importlib.import_module(f'configs.{name}').get_config()
  seen = set()
  for key, settings in list(config.evals.items()):
    kind = settings.get('kind', key), settings.get('task')
    if kind in seen and name == 'eval_all':
      del config.evals[key]  # Another set of the same kind.
    seen.add(kind)
  for title, names in config.report.averages.items():
    config.report.averages[title] = tuple(set(names) & set(config.evals))
  config = shrink(config, model=paths['small'], data=data_file)
  for settings in config.evals.values():
    task = settings.get('task', 'choice')
    if 'of' not in settings and task in BY_TASK:
      settings.data = write_rows([BY_TASK[task]] * 3)
  config.data.template = 'chat'
  config.data.max_length, config.data.max_prompt_length = 128, 96
  config.train.precision = 'float32'
  results = evaluate.run(config, [paths['small']], tmp_path)['small']
  for key in config.evals:
    if key != 'fidelity':  # There is no teacher.
      assert metrics(results, key)[0]


def binary(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'gakd_jax.evaluate', *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_the_binary_by_the_references_protocol(paths, data_file, tmp_path):
  done = binary(
    '--config=configs/eval_instruct.py:reference',
    f'--model={paths["small"]},{paths["run"]}',
    f'--workdir={tmp_path}',
    '--config.data.template=chat',
    '--config.train.precision=float32',
    *(
      f'--config.evals.{name}.{setting}'
      for name in ('dolly', 'self_inst', 'vicuna', 'sinst', 'uinst')
      for setting in (f'data={data_file}', 'limit=2', 'max_new_tokens=2')
    ),
  )
  assert done.returncode == 0, done.stderr
  assert 'dolly/rouge_l' in done.stdout
  files = sorted(x.name for x in (tmp_path / 'small' / 'answers').iterdir())
  assert files[0] == 'dolly-10.jsonl'
  assert len(files) == 5
  assert (tmp_path / 'report.html').exists()


@pytest.mark.slow
def test_errors_of_the_user_are_one_line(tmp_path):
  for arguments, message in (
    (
      [
        '--config=configs/eval_math.py',
        '--model=none',
        f'--workdir={tmp_path}',
      ],
      'error: data/llm_adapters/dataset/AddSub/test.json: no such file',
    ),
    (
      ['--config=configs/eval_instruct.py:referense', '--model=x'],
      'error: --config=configs/eval_instruct.py:referense: configs/eval_instruct',
    ),
    (
      [
        '--config=configs/eval_math.py',
        '--config.evals.gsm8k.lmit=3',
        '--model=x',
      ],
      "error: config.evals.gsm8k: generation has no setting 'lmit'; did you",
    ),
  ):
    done = binary(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message), done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.slow
def test_a_student_is_measured_with_the_template_it_was_trained_with(
  config, paths, tmp_path, capsys
):
  trained = base.get_config()
  trained.data.template = 'alpaca'
  trained.student.path = paths['small']
  models.save(
    models.load(paths['small']),
    tmp_path / 'run/best',
    describe=lambda path: best.describe(path, trained, step=3),
  )
  config.teacher.path = None
  config.data.max_length, config.data.max_prompt_length = 200, 150
  del config.evals.fidelity, config.evals.sampled
  found = {}
  for name, template in (('own', None), ('other', 'chat')):
    config.data.template = template
    workdir = tmp_path / name
    evaluate.run(config, [str(tmp_path / 'run'), paths['small']], workdir)
    found[name] = [
      rundir.read_results(workdir / model)['template']
      for model in ('run', 'small')
    ]
  assert found == {'own': ['alpaca', 'qwen3'], 'other': ['chat', 'chat']}
  assert "was trained with template 'alpaca', and is asked with 'chat'" in (
    capsys.readouterr().out
  )
