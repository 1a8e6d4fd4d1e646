import dataclasses
import json
from pathlib import Path

import pytest

from gakd_jax import UserError
from gakd_jax.data import encoding, templates, tokenizer
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
  assert templates.token_id(gpt2, '<|im_end|>') is None
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


CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
  '<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
GEMMA = (
  '{{ bos_token }}{% for m in messages %}<start_of_turn>'
  "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
  "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
  '{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}'
)
LLAMA3 = (
  '{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n'
  '{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}'
  '<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}'
)
LLAMA2 = (
  "{% for m in messages %}{% if m.role == 'user' %}"
  '{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %}'
  ' {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}'
)
PHI = (
  '{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n'
  '{% endfor %}{% if add_generation_prompt %}<|assistant|>\n'
  '{% else %}{{ eos_token }}{% endif %}'
)
PLAIN = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)


@pytest.mark.parametrize(
  ('template', 'eos', 'end'),
  [
    (CHATML, '<|endoftext|>', '<|im_end|>'),  # a base model
    (CHATML, '<|im_end|>', '<|im_end|>'),
    (GEMMA, '<eos>', '<end_of_turn>'),
    (LLAMA3, '<|end_of_text|>', '<|eot_id|>'),
    (LLAMA2, '</s>', '</s>'),
    (PHI, '<|endoftext|>', '<|end|>'),
    (PLAIN, '</s>', '</s>'),  # ends in text: in the tokenizer's EOS then
    ("{{ raise_exception('no') }}", '</s>', '</s>'),
  ],
)
def test_a_turn_ends_as_the_template_ends_it(
  bytes_tokenizer, template, eos, end
):
  found = bytes_tokenizer(template, eos, '<s>')
  end, eos = found.convert_tokens_to_ids([end, eos])
  for name in ('chat', 'qwen3'):
    assert templates.eos_id(name, found) == end
    assert templates.stop_ids(name, found) == tuple(sorted({end, eos}))
  # Another template trains the EOS; an answer ends at either.
  assert templates.eos_id('alpaca', found) == eos
  assert set(templates.stop_ids('alpaca', found)) == {end, eos}
  _, response = encoding.encode(found, SHORT, 'alpaca')
  assert response[-1] == eos


def test_generation_config_says_what_else_ends_a_turn(bytes_tokenizer):
  found = bytes_tokenizer(None, '</s>', '<|eot_id|>')
  eot, eos = found.convert_tokens_to_ids(['<|eot_id|>', '</s>'])
  assert templates.stop_ids('raw', found) == (eos,)
  file = Path(found.name_or_path) / 'generation_config.json'
  file.write_text(json.dumps({'eos_token_id': [eos, eot]}))
  assert set(templates.stop_ids('raw', found)) == {eos, eot}
  assert encoding.decode(found, found('a<|eot_id|>b').input_ids) == 'a'
  file.write_text(json.dumps({'eos_token_id': eot, 'bos_token_id': 0}))
  assert set(templates.stop_ids('raw', found)) == {eos, eot}
  file.write_text(json.dumps({'eos_token_id': None}))
  assert templates.stop_ids('raw', found) == (eos,)
  file.write_text(json.dumps({'eos_token_id': [-1, eot]}))
  assert set(templates.stop_ids('raw', found)) == {eos, eot}


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (b'[broken', 'not valid JSON'),
    (b'', 'not valid JSON'),
    (b'[]', 'not a JSON object'),
    (b'"x"', 'not a JSON object'),
    (b'\xff', 'not valid JSON'),
    (b'[' * 100_000, 'not valid JSON'),
    (b'{"eos_token_id": "</s>"}', "eos_token_id='</s>' must be a token id"),
    (b'{"eos_token_id": 2.0}', 'eos_token_id=2.0 must be'),
    (b'{"eos_token_id": true}', 'eos_token_id=True must be'),
    (b'{"eos_token_id": {"a": 1}}', 'must be a token id'),
    (b'{"eos_token_id": [2, null]}', 'must be a token id'),
    (b'{"eos_token_id": [[2]]}', 'must be a token id'),
    (b'{"eos_token_id": 1000000000000}', 'must be a token id'),
    (b'{"eos_token_id": NaN}', 'eos_token_id=nan must be'),
  ],
)
def test_a_generation_config_that_is_none(bytes_tokenizer, content, said):
  found = bytes_tokenizer(None, '</s>')
  file = Path(found.name_or_path) / 'generation_config.json'
  file.write_bytes(content)
  with pytest.raises(UserError) as error:
    templates.stop_ids('raw', found)
  assert str(error.value).startswith(f'{file}: ')
  assert said in str(error.value)
  assert str(error.value).isprintable()


def test_several_templates_with_names(bytes_tokenizer):
  found = bytes_tokenizer(None, '</s>')
  found.chat_template = {'rag': CHATML, 'tools': LLAMA2}
  with pytest.raises(UserError, match='no default chat template but rag, too'):
    templates.prompt_text('chat', SHORT, found)
  text = templates.prompt_text('chat:rag', SHORT, found)
  assert text == (
    '<|im_start|>user\nName a bird.<|im_end|>\n<|im_start|>assistant\n'
  )
  with pytest.raises(UserError, match='no of-tomorrow chat template'):
    templates.prompt_text('chat:of-tomorrow', SHORT, found)
  found.chat_template = CHATML
  with pytest.raises(UserError, match="one chat template, and none 'rag'"):
    templates.prompt_text('chat:rag', SHORT, found)
  with pytest.raises(UserError, match="unknown template 'alpaca:rag'"):
    templates.prompt_text('alpaca:rag', SHORT, found)


@pytest.mark.parametrize(
  ('template', 'reason'),
  [
    ('{{ messages[9].content }}', 'the chat template says: '),
    ('{{ 1 + "x" }}', 'the chat template says: unsupported operand'),
    ('{% for %}', 'the chat template says: '),
    ('{% for m in messages %}{{ m.text }}{% endfor %}', 'leaves out what the'),
    ('Hello.', 'leaves out what the system says'),
    ('', 'it has no chat template'),
    ('{% if %}', 'the chat template says: '),
    ('{{ messages | no_such_filter }}', 'the chat template says: No filter'),
    ('{{ nothing.of.this }}', "the chat template says: 'nothing' is undefined"),
    ('{{ messages[0].content[0:1].no.thing }}', 'the chat template says: '),
    ('{{ 1 / 0 }}', 'the chat template says: division by zero'),
    ("{% include 'other' %}", 'the chat template says: '),
    (
      '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
      'the chat template says: maximum recursion',
    ),
    (
      '{% for i in range(1000000000) %}x{% endfor %}',
      'the chat template says: Range too big',
    ),
    ("{{ ''.__class__.__mro__ }}", 'the chat template says: '),
    (
      "{{ raise_exception('no' ~ 'x\\n' * 9999) }}",
      'the chat template says: nox;',
    ),
    ("{{ raise_exception('x' * 9999) }}", 'the chat template says: x{200};'),
    ("{{ 'x' * 17000000 }}", 'longer than 16 MB'),
    ('{{ "\\ud800" }}' + CHATML, 'the chat template writes what is not UTF-8'),
    (
      "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
      'leaves out what the user says',
    ),
    (
      "{% for m in messages if m.role != 'assistant' %}{{ m.content }}"
      '{% endfor %}',
      'leaves out what the assistant says',
    ),
  ],
)
def test_whatever_a_template_does_is_one_line(tiny, template, reason):
  odd = tokenizer.load(tiny.name_or_path)
  odd.chat_template = template
  with pytest.raises(UserError, match=reason) as error:
    templates.prompt_text('chat', dataclasses.replace(TURNS), odd)
  if template:
    assert str(error.value).startswith('file.jsonl:3: ')
  assert str(error.value).isprintable()
  assert len(str(error.value)) < 400


@pytest.mark.parametrize('template', [5, ['x'], {'default': 5}, True])
def test_a_chat_template_is_text(tiny, template):
  odd = tokenizer.load(tiny.name_or_path)
  odd.chat_template = template
  with pytest.raises(
    UserError, match=r'its chat template is .*; expected text'
  ):
    templates.prompt_text('chat', SHORT, odd)


def test_thoughts_of_earlier_answers_may_be_left_out(tiny):
  thought = {'role': 'assistant', 'content': '<think>hm</think>\n\nCrow'}
  row = Row('a', messages=({'role': 'user', 'content': 'b'}, thought))
  thinker = tokenizer.load(tiny.name_or_path)
  thinker.chat_template = CHATML.replace(
    "m['content']", "m['content'].split('</think>')[-1]"
  )
  text = templates.prompt_text('chat', row, thinker)
  assert 'hm' not in text
  assert 'Crow' in text


def test_a_template_that_drops_the_system_turn_is_noticed(tiny):
  odd = tokenizer.load(tiny.name_or_path)
  odd.chat_template = (
    "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
  )
  assert templates.prompt_text('chat', SHORT, odd) == 'Name a bird.'
  with pytest.raises(BadRow, match='leaves out what the system says'):
    templates.prompt_text('chat', TURNS, odd)


def test_prompts_do_not_depend_on_the_day(tiny):
  dated = tokenizer.load(tiny.name_or_path)
  dated.chat_template = "{{ strftime_now('%d %b %Y') }} " + CHATML
  text = templates.prompt_text('chat', SHORT, dated)
  assert text.startswith('26 Jul 2024 <|im_start|>')


@pytest.mark.parametrize('opened', ['<think>', '<think>\n'])
def test_an_open_block_of_thoughts_is_closed(tiny, opened):
  thinker = tokenizer.load(tiny.name_or_path)
  opens = json.dumps(opened)
  thinker.chat_template = (
    CHATML + '{% if add_generation_prompt %}{{ ' + opens + ' }}{% endif %}'
  )
  text = templates.prompt_text('qwen3', SHORT, thinker)
  assert text.endswith('assistant\n<think>\n\n</think>\n\n')
  assert templates.prompt_text('chat', SHORT, thinker).endswith(opened)


@pytest.mark.parametrize('name', list(templates.TEMPLATES))
@pytest.mark.parametrize('template', [CHATML, GEMMA, CHATML + '<think>\n'])
def test_a_chat_template_that_asks_as_another_does(
  bytes_tokenizer, name, template
):
  found = bytes_tokenizer(template, '<|im_end|>', '<bos>')
  prompt = templates.prompt_text(name, SHORT, found)
  prompt = found.decode(templates.start(name, found)) + prompt
  other = tokenizer.load(found.name_or_path)
  other.chat_template = templates.as_jinja(name, found)
  assert templates.prompt_text('chat', SHORT, other) == prompt
  # Its turns end as those that were trained.
  assert templates.eos_id('chat', other) == templates.eos_id(name, found)
  if name in ('alpaca', 'gakd', 'raw'):
    with pytest.raises(BadRow, match='this model answers one user turn'):
      templates.prompt_text('chat', TURNS, other)


@pytest.mark.parametrize('name', ['mistral', 'tinyllama', 'gpt2', 'qwen3'])
@pytest.mark.parametrize('template', ['alpaca', 'gakd', 'raw'])
def test_real_tokenizers_ask_alike(shared_dir, name, template):
  found = tokenizer.load(shared_dir / 'tokenizers' / name)
  ids, _ = encoding.encode(found, SHORT, template)
  found.chat_template = templates.as_jinja(template, found)
  again, _ = encoding.encode(found, SHORT, 'chat')
  # Before a text, mistral's puts a blank of its own, but not after a <s>.
  assert found.decode(again).replace('> ', '>') == found.decode(ids).replace(
    '> ', '>'
  )
