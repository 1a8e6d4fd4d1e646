import json

import pytest

from gakd_jax import UserError
from gakd_jax.data import templates, tokenizer
from gakd_jax.data.sources import BadRow, Row

SHORT = Row('Name a bird.', references=('Crow',))
LONG = Row('Translate.', 'Guten Tag', ('Good day',))
TURNS = Row(
  'And a fish?',
  messages=(
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Name a bird.'},
    {'role': 'assistant', 'content': 'Crow'},
    {'role': 'user', 'content': 'And a fish?'},
  ),
  where='file.jsonl:3',
)
TASK = 'Below is an instruction that describes a task'
REQUEST = 'Write a response that appropriately completes the request.'


@pytest.fixture(scope='module')
def tiny(tiny_tokenizer_dir):
  return tokenizer.load(tiny_tokenizer_dir)


@pytest.fixture(scope='module')
def qwen3(shared_dir):
  return tokenizer.load(shared_dir / 'tokenizers/qwen3')


@pytest.fixture(scope='module')
def gpt2(shared_dir):
  return tokenizer.load(shared_dir / 'tokenizers/gpt2')


def test_gakd(tiny):
  assert templates.prompt_text('gakd', SHORT, tiny) == (
    f'<|im_start|>{TASK}. {REQUEST}\n\n'
    '### Instruction:\nName a bird.\n\n### Response:\n'
    '<|im_end|><|im_start|>Assistant:\n<think>\n\n</think>\n\n'
  )
  assert templates.prompt_text('gakd', LONG, tiny) == (
    f'<|im_start|>{TASK}. {REQUEST}\n\n'
    '### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:\n'
    '<|im_end|><|im_start|>Assistant:\n<think>\n\n</think>\n\n'
  )


def test_alpaca(tiny):
  assert templates.prompt_text('alpaca', SHORT, tiny) == (
    f'{TASK}. {REQUEST}\n\n### Instruction:\nName a bird.\n\n### Response:\n'
  )
  assert templates.prompt_text('alpaca', LONG, tiny) == (
    f'{TASK}, paired with an input that provides further context. {REQUEST}\n\n'
    '### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:\n'
  )


def test_alpaca_is_the_prompt_that_minillm_stores(shared_dir, tiny):
  lines = (shared_dir / 'data/dolly/dev.jsonl').read_text().splitlines()
  for record in map(json.loads, lines):
    row = Row(record['instruction'], record['input'])
    assert templates.prompt_text('alpaca', row, tiny) == record['prompt']


def test_raw(tiny):
  assert templates.prompt_text('raw', SHORT, tiny) == 'Name a bird.'
  assert templates.prompt_text('raw', LONG, tiny) == 'Translate.\nGuten Tag'


def test_chat_is_the_template_of_the_tokenizer(tiny):
  assert templates.prompt_text('chat', LONG, tiny) == (
    '<|im_start|>user\nTranslate.\nGuten Tag<|im_end|>\n<|im_start|>assistant\n'
  )
  assert templates.prompt_text('chat', TURNS, tiny) == (
    '<|im_start|>system\nBe brief.<|im_end|>\n'
    '<|im_start|>user\nName a bird.<|im_end|>\n'
    '<|im_start|>assistant\nCrow<|im_end|>\n'
    '<|im_start|>user\nAnd a fish?<|im_end|>\n<|im_start|>assistant\n'
  )


def test_qwen3_with_the_real_tokenizer(qwen3):
  assert templates.prompt_text('qwen3', LONG, qwen3) == (
    '<|im_start|>user\nTranslate.\nGuten Tag<|im_end|>\n'
    '<|im_start|>assistant\n<think>\n\n</think>\n\n'
  )
  text = templates.prompt_text('qwen3', TURNS, qwen3)
  assert text.startswith('<|im_start|>system\nBe brief.<|im_end|>\n')
  assert templates.eos_id('qwen3', qwen3) == 151645
  assert templates.eos_id('gakd', qwen3) == 151645


def test_eos(tiny, gpt2):
  end = tiny.convert_tokens_to_ids('<|im_end|>')
  pad = tiny.convert_tokens_to_ids('<|endoftext|>')
  other = tokenizer.load(tiny.name_or_path)
  other.eos_token = '<|endoftext|>'
  assert templates.eos_id('gakd', other) == end
  assert templates.eos_id('alpaca', other) == pad
  # gpt2's unknown token is its EOS: it must not pass for an <|im_end|>.
  assert templates.turn_end_id(gpt2) is None
  assert templates.eos_id('gakd', gpt2) == 50256
  other.eos_token = None
  with pytest.raises(UserError, match='names no EOS token'):
    templates.eos_id('raw', other)


@pytest.mark.parametrize('name', ['gakd', 'alpaca', 'raw'])
def test_single_turn_templates_refuse_conversations(name, tiny):
  with pytest.raises(BadRow, match=r'file.jsonl:3: .*one user turn only'):
    templates.prompt_text(name, TURNS, tiny)


def test_what_a_chat_template_refuses_is_a_bad_row(tiny):
  strict = tokenizer.load(tiny.name_or_path)
  strict.chat_template = "{{ raise_exception('roles must alternate') }}"
  with pytest.raises(BadRow, match=r'file.jsonl:3: .*roles must alternate'):
    templates.prompt_text('chat', TURNS, strict)


def test_unknown_template_suggests(tiny):
  with pytest.raises(UserError, match="'qwen2': did you mean 'qwen3'"):
    templates.prompt_text('qwen2', SHORT, tiny)
  with pytest.raises(UserError, match="'zzz': there are qwen3, gakd"):
    templates.eos_id('zzz', tiny)


def test_no_chat_template(gpt2):
  for name in ('qwen3', 'chat'):
    with pytest.raises(UserError, match='it has no chat template'):
      templates.prompt_text(name, SHORT, gpt2)


def test_an_answer_ends_at_any_token_that_ends_one():
  class Tokenizer:
    eos_token_id, unk_token_id = 2, 0

    def convert_tokens_to_ids(self, token):
      return {'<|im_end|>': 7, '<end_of_turn>': 5}.get(token, 0)

  assert templates.stop_ids('chat', Tokenizer()) == (2, 5, 7)
  assert templates.stop_ids('qwen3', Tokenizer()) == (2, 5, 7)
  Tokenizer.convert_tokens_to_ids = lambda self, token: 0
  assert templates.stop_ids('raw', Tokenizer()) == (2,)
