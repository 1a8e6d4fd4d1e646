"""Every field of a config has a type and a range; what is outside is one line."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st

from configs import base
from gakd_jax import UserError, evaluate, fields

NAN, INF = float('nan'), float('inf')
# What is wrong of each field, beside what no field is.
WRONG = {
  'seed': [-1, 1.5, 'x', True, 2**70],
  'student.path': [3, '', 'a\0b', ('a',)],
  'student.shape': [
    3,
    [1],
    {'width': 'x'},
    {'width': 0},
    {'layers': -1},
    {'wdith': 3},
    {'family': 'x'},
    {'windows': ('a',)},
    {'rope_scaling': ('a',)},
    {3: 1},
  ],
  'student.keep': [
    3,
    {'layers': 0},
    {'layers': (2, 1)},
    {'layers': (1, 1)},
    {'layers': ()},
    {'layer': 3},
    {'by': 'chance'},
    {'ff_width': 2.5},
    {'kv_heads': 0},
    {'rows': 0},
  ],
  'student.dtype': ['bf16', 'int8', 3],
  'student.lora': [
    'rank 4',
    4,
    [4],
    {'rank': 'x'},
    {'rank': 0},
    {'rnak': 3},
    {'rank': 2.5},
    {'alpha': NAN},
    {'alpha': INF},
    {'alpha': 0.0},
    {'dropout': 1},
    {'dropout': -0.1},
    {'targets': '('},
    {'targets': 3},
    {'rank': None},
    {'targets': ['a']},
  ],
  'student.quantize': ['int4', 8],
  'student.remat': ['all', True],
  'teacher.path': [3, ''],
  'teacher.template': [3, ''],
  'teacher.dtype': ['half'],
  'teacher.quantize': ['fp4'],
  'teacher.cache': ['yes', 1, True],
  'teacher.cache_size': [0, -1, 1 << 16, 8.5],
  'attention': [3, 'flash'],
  'data.train': [3, '', (3,), {'a': 1}, ('a', None)],
  'data.validation': [3, ''],
  'data.template': [3, ''],
  'data.max_length': [0, -5, 64.5, '64', 10**12],
  'data.max_prompt_length': [0, -1],
  'data.buckets': [(0,), ('a',), 64, (), (-1, 64)],
  'data.packing': ['no', 1],
  'data.on_bad_row': ['ignore'],
  'data.thinking': ['maybe'],
  'data.weights': [(-1.0,), 'x', (INF,), (NAN,), (0.0,), 3, ('a',)],
  'data.turns': ['first'],
  'data.drop_last': ['x'],
  'data.cache': [3, ''],
  'rollout': ['teacher', {}, {'writer': 3}, {'writer': 'x'}, {0: 1}],
  'objective': [
    'kld',
    {},
    {'name': 3},
    {'name': ['kld']},
    {'name': 'KLD'},
    {'name': 'gakd', 'critic': {}},
    {'name': 'kld', 'head_chunk': 3},
  ],
  'critic.init_from': [3],
  'critic.width': [0, 'x', -2],
  'critic.layers': [1.5],
  'critic.heads': [0],
  'critic.ff_width': [-1],
  'optimizer.name': ['adam', 3],
  'optimizer.learning_rate': [INF, NAN, 0.0, -1.0, '1e-4'],
  'optimizer.schedule': ['cos'],
  'optimizer.end': [-1.0, NAN, INF, 1.0],  # The last: above the rate.
  'optimizer.warmup_steps': [-1, 1.5],
  'optimizer.b1': [1.0, -1.0, NAN],
  'optimizer.b2': [1.5, NAN],
  'optimizer.eps': [0.0, -1e-8, INF],
  'optimizer.weight_decay': [-1.0, NAN],
  'optimizer.no_decay': ['(', 3],
  'optimizer.clip_norm': [-1.0, 0.0, NAN, INF, 'x'],
  'optimizer.mu_dtype': ['float16', 3],
  'optimizer.extra_learning_rate': [-1.0, 0.0, INF],
  'critic_optimizer.name': ['adam'],
  'critic_optimizer.learning_rate': [-1.0],
  'critic_optimizer.schedule': ['x'],
  'critic_optimizer.end': [-1.0],
  'critic_optimizer.warmup_steps': [-1],
  'critic_optimizer.b1': [2.0],
  'critic_optimizer.b2': [2.0],
  'critic_optimizer.eps': [0.0],
  'critic_optimizer.weight_decay': [-1.0],
  'critic_optimizer.no_decay': ['['],
  'critic_optimizer.clip_norm': [-1.0],
  'critic_optimizer.mu_dtype': ['float16'],
  'train.steps': [-1, 1.5, True, NAN, [1], 10**12],
  'train.epochs': [-1.0, 0.0, NAN, INF, 'x'],
  'train.batch_size': [0, -8, 8.0],
  'train.microbatch_size': [0, -1, 'x'],
  'train.precision': ['fp16', 'float64'],
  'train.head_chunk': [0, 'x'],
  'train.head_memory': [0.0, -1.0, NAN, INF, 'x'],
  'train.max_skipped': [0, 1.5],
  'train.skip_spikes': [0.0, -1.0, NAN, INF],
  'evals': ['loss', ('loss',), {'loss': None}, {'loss': 3}, {0: {}}]
  + [{x: {'kind': 'loss'}} for x in ('a/b', '-/', '')]
  + [{'loss': {'kind': x}} for x in (3, ['loss'], 'lss')]
  + [{'fidelity': {}}, {'fidelity': {'of': 3}}],
  'eval_every': [-1, 1.5],
  'eval_first': ['x'],
  'checkpoint.every': [-1, 'x'],
  'checkpoint.keep': [0, -1],
  'checkpoint.keep_every': [-1],
  'checkpoint.best_metric': [3, ''],
  'checkpoint.patience': [0, -1],
  'mesh.data': [0, -2, 1.5, 'x'],
  'mesh.fsdp': [0],
  'mesh.tensor': ['x', -3],
  'report.trackers': ['tensorboard', ('x',), (3,), 3],
  'report.answers': [-1, 'x'],
  'report.rollouts': [-1],
  'report.averages': [
    *({'a': x} for x in (3, (), 'loss', (3,), ('los',))),
    {'loss': ('loss',)},
  ],
}
# Where None is a value.
MAY_BE_NONE = {
  *('student.path', 'student.shape', 'student.lora', 'student.quantize'),
  'student.keep',
  *('teacher.path', 'teacher.template', 'teacher.quantize'),
  *('data.train', 'data.validation', 'data.template', 'data.buckets'),
  *('data.weights', 'data.cache', 'critic.init_from'),
  *('optimizer.clip_norm', 'optimizer.extra_learning_rate'),
  *('critic_optimizer.clip_norm', 'train.steps', 'train.epochs'),
  *('train.skip_spikes', 'train.microbatch_size', 'train.head_memory'),
  *('checkpoint.best_metric', 'checkpoint.patience'),
}
# Parts that a config names: what is wrong of their own settings.
PARTS = [
  *[('rollout', {'writer': 'teacher'} | x) for x in (
    {'max_new_tokens': 0}, {'max_new_tokens': 2**25}, {'temperature': -1},
    {'temperature': NAN}, {'temperature': INF}, {'top_p': 0}, {'top_p': 1.5},
    {'top_k': -1}, {'no_repeat_ngram': -1}, {'batch_size': 0}, {'samples': 0},
    {'samples': 257}, {'cache': 'int4'},
  )],
  *[('rollout', {'writer': 'student'} | x) for x in (
    {'share': 1.5}, {'share': NAN}, {'begin': 1.0, 'end': 0.5}, {'every': 0},
    {'prefix': 0}, {'temperature': -1.0}, {'top_p': 0.0}, {'ends': 3},
    {'max_new_tokens': None}, {'cache': 8}, {'samples': 0}, {'beside': 1},
  )],
  *[('rollout', {'writer': 'speculative'} | x) for x in (
    {'gamma': 0}, {'accept': 'x'}, {'accept': 3}, {'k': 0}, {'alpha': 2.0},
    {'g': -1.0}, {'teacher_temperature': -1.0}, {'teacher_top_p': 0.0},
    {'teacher_top_k': -1}, {'accept': 'mixture', 'temperature': 0},
  )],
  *[('objective', {'name': 'kld'} | x) for x in (
    {'kd': NAN}, {'kd': -0.1}, {'temperature': 0}, {'temperature': INF},
    {'threshold': NAN}, {'threshold': -1.0}, {'divergence': 3},
    {'divergence': None}, {'divergence': ''}, {'scale_by_t2': 1},
  )],
  *[('objective', {'name': 'gakd'} | x) for x in (
    {'g': NAN}, {'g': INF}, {'gamma': -1}, {'critic_steps': 0},
    {'warmup_epochs': -1}, {'warmup_epochs': INF}, {'warmup_steps': -1},
    {'kind': None}, {'rkl_scale': -1.0},
    {'reference': True, 'pooling': 'mean'},
  )],
  *[('objective', {'name': 'mcw'} | x) for x in (
    {'update_every': -1}, {'potential': 0}, {'critic_steps': 0}, {'ce': -1.0},
    {'epsilon': INF}, {'iterations': 0}, {'solver': 'x'}, {'total_steps': -4},
  )],
  *[('objective', x) for x in (
    {'name': 'uld', 'ce': -1.0}, {'name': 'uld', 'ce': INF},
    {'name': 'uld', 'top': 0}, {'name': 'alm', 'sizes': ()},
    {'name': 'alm', 'sizes': (0,)}, {'name': 'alm', 'sizes': ('a',)},
    {'name': 'alm', 'difference': 'x'}, {'name': 'gold', 'merge': 'x'},
    {'name': 'gold', 'beta': 2.0}, {'name': 'xtoken', 'decay': -1.0},
    {'name': 'multilevel_ot', 'ot': -1.0}, {'name': 'mined', 'kd': 2.0},
    {'name': 'dskd_cma', 'teacher_temperature': 0.0},
    {'name': 'dskd_v2', 'divergence': 'x'}, {'name': 'overlap', 'kd': -1.0},
    {'name': 'distillm2', 'alpha': 2.0},
  )],
  *[('evals', {'generation': x}) for x in (
    {'seeds': ()}, {'seeds': (1, 1)}, {'seeds': (-1,)}, {'seeds': ('a',)},
    {'temperature': -1.0}, {'temperature': NAN}, {'temperature': INF},
    {'top_p': 0.0}, {'top_p': 1.1}, {'top_k': -1}, {'no_repeat_ngram': -1},
    {'max_new_tokens': 0}, {'batch_size': 0}, {'task': 'x'}, {'task': None},
    {'stop': ('',)}, {'stop': 3}, {'first_reference': 1}, {'about': {}},
    {'limit': 0}, {'every': -1}, {'data': 3}, {'data': ''}, {'cache': 'fp8'},
  )],
  *[('evals', x) for x in (
    {'loss': {'batch_size': 0}}, {'loss': {'every': 1.5}},
    {'multiple_choice': {'normalise': 'x'}},
    {'multiple_choice': {'batch_size': 0}},
    {'fidelity': {'of': 'loss', 'batch_size': 0}},
    {'comet': {'of': 'generation', 'model': ''}},
    {'draft': {'gammas': ()}}, {'draft': {'gammas': (0,)}},
    {'draft': {'cost': 0.0}}, {'draft': {'temperature': -1.0}},
  )],
]  # fmt: skip


def flat(fields, prefix=''):
  for key, kind in fields.items():
    if isinstance(kind, dict):
      yield from flat(kind, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}'


def changed(key, value):
  config = base.get_config()
  config.student.lora = {}
  with config.ignore_type(), config.unlocked():
    *parts, last = key.split('.')
    part = config
    for name in parts:
      part = part[name]
    part[last] = value
  return config


def refusal(config):
  with pytest.raises(UserError) as error:
    fields.check(config)
  text = str(error.value)
  assert '\n' not in text
  assert len(text) < 500
  return text


def test_every_field_is_in_the_table_and_wrong_in_some_way():
  config = base.get_config()
  fields.check(config)
  keys = {*flat(fields.FIELDS)}
  ours = {
    key for key in config.to_dict() if not isinstance(fields.FIELDS[key], dict)
  } | {
    f'{part}.{key}'
    for part, known in fields.FIELDS.items()
    if isinstance(known, dict)
    for key in config[part]
  }
  assert keys == ours
  assert keys == {*WRONG, 'stages'}


@pytest.mark.parametrize(
  ('key', 'value'),
  [(key, x) for key, values in WRONG.items() for x in values]
  + [(key, None) for key in WRONG if key not in MAY_BE_NONE]
  + PARTS,
  ids=str,
)
def test_what_no_field_may_be(key, value):
  text = refusal(changed(key, value))
  assert key.split('.')[-1] in text
  assert 'config' in text


@pytest.mark.parametrize('key', sorted(MAY_BE_NONE))
def test_what_may_be_none(key):
  fields.check(changed(key, None))


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('a/b', "a name in config.stages='a/b': expected"),
    ('..', "'..': expected"),
    ('.hidden', "'.hidden': expected"),
    ('', "'': expected"),
    (3, 'config.stages=3: expected'),
  ],
)
def test_names_of_stages_are_those_of_directories(name, text):
  assert text in refusal(changed('stages', ((name, base.get_config()),)))


@pytest.mark.parametrize(
  'stages',
  [3, 'abc', (3,), (('a', 3, 4),), {'a': 3}, None, (('a',),)],
  ids=str,
)
def test_stages_are_pairs(stages):
  assert 'a tuple of pairs' in refusal(changed('stages', stages))


def test_what_is_wrong_in_a_stage_names_it():
  config = changed('train.steps', -1)
  text = refusal(changed('stages', (('first', config),)))
  assert text.startswith("stage 'first': config.train.steps=-1: expected")
  inner = changed('stages', (('b', base.get_config()),))
  text = refusal(changed('stages', (('a', inner),)))
  assert text == "stage 'a': config.stages: a stage has no stages of its own"
  two = (('a', base.get_config()), ('a', base.get_config()))
  assert "two stages are called 'a'" in refusal(changed('stages', two))
  assert '3 is no config' in refusal(changed('stages', (('a', 3),)))


@pytest.mark.parametrize(
  'key', ['foo', 'train.foo', 'mesh.foo', 'optimizer.b3']
)
def test_a_field_that_there_is_not(key):
  name = key.rpartition('.')[2]
  assert f"a config has no setting '{name}'" in refusal(changed(key, 3))


@pytest.mark.parametrize('key', ['train', 'train.steps', 'report.trackers'])
def test_a_field_that_is_missing(key):
  config = base.get_config()
  *parts, last = key.split('.')
  with config.unlocked():
    del (config[parts[0]] if parts else config)[last]
  assert f'config.{key} is missing; begin with' in refusal(config)


@pytest.mark.parametrize('config', [None, 3, {}, {'seed': 0}, ()], ids=str)
def test_what_is_no_config(config):
  assert 'is no config; begin with get_config()' in refusal(config)


def test_fields_that_exclude_each_other():
  config = changed('train.epochs', 1.0)
  config.train.steps = 3
  assert refusal(config) == (
    'config.train: steps=3 and epochs=1.0: set one, and the other to None'
  )
  config = changed('student.quantize', 'int8')
  fields.check(config)
  config.student.lora = None
  assert "quantize='int8' is for a base that is not trained" in refusal(config)


def test_an_evaluation_is_refused_before_anything_is_written(tmp_path):
  config = changed('evals', {'generation': {'top_p': 0.0}})
  with pytest.raises(UserError, match=r'generation\.top_p=0\.0: expected'):
    evaluate.run(config, ['no/such/model'], tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


values = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=4)
  | st.sampled_from(['kld', 'loss', 'int8', 'teacher', 'adamw', 'float32']),
  lambda x: (
    st.lists(x, max_size=3)
    | st.lists(x, max_size=3).map(tuple)
    | st.dictionaries(
      st.sampled_from(['name', 'writer', 'kind', 'rank', 'kd', 'loss', 'a'])
      | st.integers(0, 3),
      x,
      max_size=3,
    )
  ),
  max_leaves=6,
)


@how(max_examples=60, deadline=None)
@given(key=st.sampled_from([*flat(fields.FIELDS)]), value=values)
def test_whatever_a_field_is_it_is_taken_or_refused_in_a_line(key, value):
  with contextlib.suppress(UserError):
    fields.check(changed(key, value))
