import json
import os
import subprocess
import sys

import pytest

from gakd_jax import models, streaming
from gakd_jax.data import encoding, sources, templates
from gakd_jax.data import tokenizer as tokenizers
from gakd_jax.models import decoding


def run(*arguments, text='', **env):
  return subprocess.run(
    [sys.executable, '-m', 'gakd_jax.generate', *arguments],
    input=text.encode(errors='surrogateescape'),
    capture_output=True,
    env=os.environ | {'PYTHONUTF8': '1'} | env,
    check=False,
  )


def expected_answers(path, questions, seed, **settings):
  model, tokenizer = decoding.unstack(models.load(path)), tokenizers.load(path)
  for i, question in enumerate(questions):
    ids, _ = encoding.encode(tokenizer, sources.Row(question), 'chat')
    response = streaming.generate(
      model,
      [ids],
      seed=seed + i,
      eos_ids=[templates.eos_id('chat', tokenizer)],
      valid_vocab=len(tokenizer),
      **settings,
    )
    yield encoding.decode(tokenizer, response[0])


@pytest.mark.slow
def test_a_reader_that_goes_away_is_one_line():
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, '-m', 'gakd_jax.generate', '--prompt=a']
  command += ['--model=configs/assets/tiny_teacher', '--max_new_tokens=1']
  done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
  assert done.returncode == 2
  said = b'error: whoever read what this prints has gone\n'
  assert done.stderr.endswith(said)
  assert b'Traceback' not in done.stderr


def test_each_line_and_a_single_prompt_are_answered(tiny_model_dir, tmp_path):
  model_dir = tiny_model_dir()
  settings = [f'--model={model_dir}', '--max_new_tokens=8', '--top_k=50']
  kept = {'JAX_COMPILATION_CACHE_DIR': str(tmp_path)}
  typed = 'Say hi.\nSay hi.\nexit\nnot asked\n'
  lines = run(*settings, '--seed=3', text=typed, **kept)
  assert lines.returncode == 0, lines.stderr.decode()
  first, again = expected_answers(
    model_dir, ['Say hi.'] * 2, seed=3, max_new_tokens=8, top_k=50
  )
  assert first != again, 'asked again, drawn again'
  assert lines.stdout.decode() == f'{first}\n{again}\n'
  programs = {x.name for x in tmp_path.glob('*-cache')}
  assert programs, 'each is compiled once'
  flags = '--seed=4', '--prompt=Say hi.'
  ascii = {'PYTHONIOENCODING': 'ascii'}  # of a terminal that knows no more
  single = run(*settings, *flags, text='not asked\n', **kept, **ascii)
  assert not again.isascii()
  shown = f'{again}\n'.encode('ascii', 'backslashreplace')
  assert single.stdout == shown, single.stderr.decode()
  assert {x.name for x in tmp_path.glob('*-cache')} == programs


_WATCHED = """
import sys
from absl import flags
from gakd_jax import generate, streaming
streaming.generate = lambda model, *_, **__: [print(model.cache_kind) or [1]]
flags.FLAGS(sys.argv)
list(generate.answers(['Say hi.']))
"""


@pytest.mark.slow
@pytest.mark.parametrize('kind', [None, 'int8'])
def test_keys_and_values_are_in_int8_if_asked(tiny_model_dir, kind):
  command = [sys.executable, '-c', _WATCHED, f'--model={tiny_model_dir()}']
  command += [f'--cache={kind}'] * bool(kind)
  assert subprocess.check_output(command, text=True) == f'{kind}\n'


def test_user_errors_are_one_line(tmp_path):
  result = run(f'--model={tmp_path / "nowhere"}', '--prompt=Hi')
  assert result.returncode == 2
  assert result.stderr.decode().startswith('error: model ')
  assert result.stderr.decode().count('\n') == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'typed', 'said'),  # The last is Latin-1.
  [
    (['--prompt=caf\udce9'], '', 'prompt 1: has what is no character'),
    (['--prompt='], '', 'prompt 1: a prompt without a token'),
    ([], 'caf\udce9\n', 'the input is no text: '),
  ],
)
def test_a_prompt_is_text(tiny_model_dir, flags, typed, said):
  result = run(
    *(f'--model={tiny_model_dir()}', '--template=raw', *flags),
    text=typed,
    PYTHONIOENCODING='utf-8:strict',
  )
  assert result.returncode == 2
  assert result.stderr.decode().startswith(f'error: {said}')
  assert result.stderr.decode().count('\n') == 1


@pytest.mark.slow
def test_a_data_set_is_answered(tiny_model_dir, tmp_path):
  model_dir = tiny_model_dir()
  data, output = tmp_path / 'prompts.jsonl', tmp_path / 'answers.jsonl'
  data.write_text('{"prompt": "Say hi."}\n{"prompt": "Say no."}\nnot JSON\n')
  command = [
    f'--model={model_dir}',
    f'--dataset={data}',
    f'--output={output}',
    '--samples=2',
    '--max_new_tokens=8',
    '--top_k=50',
    '--seed=3',
    '--keep_unfinished',
  ]
  result = run(*command)
  assert result.returncode == 0, result.stderr.decode()
  said = result.stdout.decode()
  assert 'data: 1 skipped: not JSON\n' in said
  assert '4/4' in said
  assert 'answers: 4 to 2 prompts\n' in said
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [line['sample'] for line in lines] == [0, 1, 0, 1]
  # The first sample of the first row is the answer to a single prompt.
  (first,) = expected_answers(
    model_dir, ['Say hi.'], seed=3, max_new_tokens=8, top_k=50
  )
  assert lines[0]['output'] == first
  rows, bad = sources.load(output)
  assert [row.references[0] for row in rows] == [x['output'] for x in lines]
  assert not bad
  again = run(*command)
  assert again.returncode == 2
  assert 'it exists; name another file' in again.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--dataset=none', '--prompt=Hi', '--output=a.jsonl'], '--prompt out'),
    (['--dataset=none', '--output=a.parquet'], 'needs --output=FILE.jsonl'),
    (
      ['--dataset=none', '--output=a.jsonl', '--samples=2', '--temperature=0'],
      'would all be the same',
    ),
    (['--prompt=Hi', '--samples=2'], '--samples is of --dataset'),
    (['--prompt=Hi', '--cache=int4'], 'should be one of <int8>'),
    (['--prompt=Hi', '--top_p=0'], '--top_p=0.0: expected a number (more'),
  ],
)
def test_flags_that_do_not_go_together(arguments, message):
  """Refused before the model, which is not there, is looked for."""
  result = run('--model=none', *arguments)
  assert result.returncode == 2
  assert message in result.stderr.decode()
  assert result.stderr.decode().count('\n') == 1
