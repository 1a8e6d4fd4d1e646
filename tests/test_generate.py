import os
import subprocess
import sys

from gakd_jax import models, sampling
from gakd_jax.data import sources, templates
from gakd_jax.data import tokenizer as tokenizers


def run(*arguments, text=''):
  return subprocess.run(
    [sys.executable, '-m', 'gakd_jax.generate', *arguments],
    input=text.encode(),
    capture_output=True,
    env=os.environ | {'PYTHONUTF8': '1', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
    check=False,
  )


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


def test_each_line_and_a_single_prompt_are_answered(tiny_model_dir):
  model_dir = tiny_model_dir()
  settings = [f'--model={model_dir}', '--max_new_tokens=8', '--top_k=50']
  lines = run(*settings, '--seed=3', text='Say hi.\nSay hi.\nexit\nnot asked\n')
  assert lines.returncode == 0, lines.stderr.decode()
  first, again = expected_answers(
    model_dir, ['Say hi.'] * 2, seed=3, max_new_tokens=8, top_k=50
  )
  assert first != again, 'asked again, drawn again'
  assert lines.stdout.decode() == f'{first}\n{again}\n'
  single = run(*settings, '--seed=4', '--prompt=Say hi.', text='not asked\n')
  assert single.stdout.decode() == f'{again}\n'


def test_user_errors_are_one_line(tmp_path):
  result = run(f'--model={tmp_path / "nowhere"}', '--prompt=Hi')
  assert result.returncode == 2
  assert result.stderr.decode().startswith('error: model ')
  assert result.stderr.decode().count('\n') == 1
