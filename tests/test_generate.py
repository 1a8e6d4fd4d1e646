import os
import subprocess
import sys

import pytest

from gakd_jax import models, sampling
from gakd_jax.data import sources, templates
from gakd_jax.data import tokenizer as tokenizers


def run(*arguments, text=''):
  return subprocess.run(
    [sys.executable, '-m', 'gakd_jax.generate', *arguments],
    input=text.encode(),
    capture_output=True,
    env=os.environ | {'PYTHONUTF8': '1'},
    check=False,
  )


@pytest.fixture(scope='module')
def model_dir(tiny_model_dir):
  return tiny_model_dir()


def expected_answers(path, questions, seed, **settings):
  model, tokenizer = models.load(path), tokenizers.load(path)
  for i, question in enumerate(questions):
    ids, _ = tokenizers.encode(tokenizer, sources.Row(question), 'chat')
    response = sampling.generate(
      model,
      [ids],
      seed=seed + i,
      eos_ids=[templates.eos_id('chat', tokenizer)],
      valid_vocab=len(tokenizer),
      **settings,
    )
    yield tokenizers.decode(tokenizer, response[0])


def test_every_line_is_answered(model_dir):
  result = run(
    f'--model={model_dir}',
    '--max_new_tokens=8',
    '--top_k=50',
    '--seed=3',
    text='Say hi.\nSay hi.\nexit\nnot asked\n',
  )
  answers = list(
    expected_answers(
      model_dir, ['Say hi.'] * 2, seed=3, max_new_tokens=8, top_k=50
    )
  )
  assert answers[0] != answers[1], 'asked again, drawn again'
  assert result.returncode == 0, result.stderr.decode()
  assert result.stdout.decode() == ''.join(a + '\n' for a in answers)


def test_one_prompt_then_stop(model_dir):
  result = run(
    f'--model={model_dir}',
    '--prompt=Say hi.',
    '--max_new_tokens=8',
    '--temperature=0',
    text='not asked\n',
  )
  (answer,) = expected_answers(
    model_dir, ['Say hi.'], seed=0, max_new_tokens=8, temperature=0.0
  )
  assert result.returncode == 0, result.stderr.decode()
  assert result.stdout.decode() == answer + '\n'


def test_user_errors_are_one_line(tmp_path):
  result = run(f'--model={tmp_path / "nowhere"}', '--prompt=Hi')
  assert result.returncode == 2
  assert result.stderr.decode().startswith('error: model ')
  assert result.stderr.decode().count('\n') == 1
