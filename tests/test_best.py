import json
import shutil

import pytest

from configs import base
from gakd_jax import UserError, best, models
from gakd_jax.data import tokenizer as tokenizer_lib


@pytest.fixture
def trained(tiny_model_dir, tmp_path):
  """`trained(**data)`: a run's directory whose best/ is described."""

  def make(template='alpaca', student='org/base', train='data/x.jsonl'):
    c = base.get_config()
    c.student.path, c.teacher.path = student, '/models/large'
    c.data.template, c.data.train = template, train
    source = tiny_model_dir()
    run = tmp_path / 'runs/one'
    model = models.load(source)
    models.save(
      model,
      run / 'best',
      describe=lambda path: best.describe(
        path, c, step=30, metric=('greedy/rouge_l', 41.5)
      ),
    )
    # A run's own config.json is not a model's.
    (run / 'config.json').write_text(json.dumps({'config': {}}))
    return run

  return make


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
  commits = {'org/base': 'abc123'}
  monkeypatch.setattr(models, 'revision', commits.get)


def test_best_says_where_it_comes_from(trained):
  run = trained(train=('a.jsonl', 'b.jsonl'))
  about = json.loads((run / 'best' / best.RECORD).read_text())
  assert (
    about.items()
    >= {
      'base': 'org/base',
      'base_revision': 'abc123',
      'teacher_revision': None,
      'teacher': '/models/large',
      'objective': 'sft',
      'data': ['a.jsonl', 'b.jsonl'],
      'template': 'alpaca',
      'step': 30,
      'metric': 'greedy/rouge_l',
      'value': 41.5,
    }.items()
  )
  head, _, card = (
    (run / 'best/README.md').read_text().removeprefix('---\n').partition('---')
  )
  assert 'base_model: org/base\n' in head
  assert 'library_name: transformers\n' in head
  assert '| template | alpaca |' in card
  assert '| value | 41.5 |' in card


def test_a_base_that_lies_here_is_no_hub_id(trained):
  run = trained(student='/here/base')
  assert 'base_model' not in (run / 'best/README.md').read_text()


def test_a_model_is_asked_as_it_was_trained(trained, capsys):
  run = trained()
  for path in (run, run / 'best'):
    assert best.template_of(path) == 'alpaca'
    assert best.template_of(path, 'alpaca') == 'alpaca'
    assert not capsys.readouterr().out
    assert best.template_of(path, 'chat') == 'chat'
    assert capsys.readouterr().out == (
      f"{path} was trained with template 'alpaca', and is asked with 'chat'\n"
    )
  found = tokenizer_lib.load(models.tokenizer_dir(run))
  assert '### Instruction' in found.chat_template
  assert models.read_config(run) == models.read_config(run / 'best')


def test_nothing_is_known_of_other_models(tiny_model_dir):
  assert best.template_of(tiny_model_dir()) == 'qwen3'
  assert best.template_of(tiny_model_dir(), None, 'chat') == 'chat'
  assert best.template_of(tiny_model_dir(), 'raw') == 'raw'


@pytest.mark.parametrize('text', ['{"step": 1}', '[]', 'not JSON'])
def test_a_broken_record_is_one_line(trained, text):
  run = trained()
  (run / 'best' / best.RECORD).write_text(text)
  with pytest.raises(UserError, match=r'gakd_jax.json: not a record of'):
    best.template_of(run)


def test_what_a_directory_says_travels_with_it(trained, tmp_path):
  copy = tmp_path / 'elsewhere'
  shutil.copytree(trained() / 'best', copy)
  assert best.template_of(copy) == 'alpaca'
