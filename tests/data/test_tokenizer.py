import dataclasses
import json
import shutil

import pytest

from gakd_jax import UserError
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow, Row, load

ROW = Row('Name a bird.', 'Not a duck.', ('Crow', 'Raven'))


@pytest.fixture
def tiny(tiny_tokenizer_dir):
  return tokenizer_lib.load(tiny_tokenizer_dir)


@pytest.fixture(scope='module')
def real(shared_dir):
  """name -> one of the real tokenizers, loaded once."""
  loaded = {}

  def get(name):
    if name not in loaded:
      loaded[name] = tokenizer_lib.load(shared_dir / 'tokenizers' / name)
    return loaded[name]

  return get


@pytest.mark.parametrize(
  ('name', 'size', 'eos'),
  [
    ('qwen3', 151669, 151645),
    ('gpt2', 50257, 50256),
    ('mistral', 32000, 2),
    ('tinyllama', 32000, 2),
  ],
)
def test_load_real(real, name, size, eos):
  tokenizer = real(name)
  assert (len(tokenizer), tokenizer.eos_token_id) == (size, eos)


def test_load_without_a_usable_config(tmp_path, tiny, tiny_tokenizer_dir):
  shutil.copy(tiny_tokenizer_dir / 'tokenizer.json', tmp_path)
  bare = tokenizer_lib.load(tmp_path)
  assert bare.get_vocab() == tiny.get_vocab()
  (tmp_path / 'config.json').write_text('{"model_type": "of-tomorrow"}')
  assert tokenizer_lib.load(tmp_path).get_vocab() == tiny.get_vocab()
  with pytest.raises(UserError, match='neither a pad nor an EOS'):
    tokenizer_lib.pad_id(bare)


def test_load_never_asks_for_remote_code(
  tmp_path, tiny_tokenizer_dir, monkeypatch
):
  monkeypatch.setattr('builtins.input', lambda *_: pytest.fail('it asked'))
  shutil.copy(tiny_tokenizer_dir / 'tokenizer.json', tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'Odd',
        'auto_map': {'AutoTokenizer': ['code.Odd', None]},
      }
    )
  )
  with pytest.raises(UserError, match='contains custom code'):
    tokenizer_lib.load(tmp_path)


@pytest.mark.parametrize('path', ['/no/such/place', 'org/none', 'nothing'])
def test_load_fails_in_one_line(path):
  with pytest.raises(UserError) as error:
    tokenizer_lib.load(path)
  assert str(error.value).startswith(f'{path}: no tokenizer can be loaded')
  assert '\n' not in str(error.value)


def test_pad_falls_back_to_eos(tiny):
  assert tokenizer_lib.pad_id(tiny) == tiny.pad_token_id != tiny.eos_token_id
  tiny.pad_token = None
  assert tokenizer_lib.pad_id(tiny) == tiny.eos_token_id


def test_prompt_and_response_are_encoded_apart(tiny):
  prompt, response = tokenizer_lib.encode(tiny, ROW, 'chat')
  assert (
    prompt
    == tiny(
      templates.prompt_text('chat', ROW, tiny), add_special_tokens=False
    ).input_ids
  )
  assert tiny.decode(response) == 'Crow<|im_end|>'
  assert response[-1] == tiny.eos_token_id
  # Together they would be merged: 'he' is one token of this vocabulary.
  row = Row('h', references=('e',))
  assert len(tiny('he').input_ids) == 1
  prompt, response = tokenizer_lib.encode(tiny, row, 'raw')
  assert prompt == tiny('h').input_ids
  assert response[:-1] == tiny('e').input_ids


def test_eos_ends_the_response_even_if_it_is_the_pad(tiny):
  tiny.pad_token = tiny.eos_token
  _, response = tokenizer_lib.encode(tiny, ROW, 'raw')
  assert response == [*tiny('Crow').input_ids, tokenizer_lib.pad_id(tiny)]


def test_a_prompt_alone_has_no_response(tiny):
  row = dataclasses.replace(ROW, references=())
  assert tokenizer_lib.encode(tiny, row, 'raw')[1] == []


def test_batch_encodes_as_one_by_one(tiny):
  rows = [ROW, Row('Hi'), Row('\u00e9', references=('\U0001f600 ok',))]
  assert tokenizer_lib.encode_batch(tiny, rows, 'alpaca') == [
    tokenizer_lib.encode(tiny, row, 'alpaca') for row in rows
  ]
  assert tokenizer_lib.encode_batch(tiny, [], 'alpaca') == []
  turns = ({'role': 'user', 'content': 'x'},) * 2
  rows[1] = Row('x', messages=turns, references=('y',))
  first, bad, last = tokenizer_lib.encode_batch(tiny, rows, 'alpaca')
  assert isinstance(bad, BadRow)
  assert first == tokenizer_lib.encode(tiny, rows[0], 'alpaca')
  assert last == tokenizer_lib.encode(tiny, rows[2], 'alpaca')


def test_bos_stands_before_plain_prompts_only(real):
  for name in ('mistral', 'tinyllama'):
    prompt, response = tokenizer_lib.encode(real(name), ROW, 'alpaca')
    assert prompt[0] == 1
    assert prompt.count(1) == 1
    assert 1 not in response
    assert response[-1] == 2
    prompt, _ = tokenizer_lib.encode(real(name), ROW, 'gakd')
    assert 1 not in prompt


def test_real_qwen3_ids(real):
  prompt, response = tokenizer_lib.encode(real('qwen3'), ROW, 'qwen3')
  assert prompt[:3] == [151644, 872, 198]  # <|im_start|>user\n
  assert prompt[-4:] == [151667, 271, 151668, 271]  # <think> </think>
  assert response[-1] == 151645


def test_same_tokenizers_pass(tiny, tiny_tokenizer_dir):
  other = tokenizer_lib.load(tiny_tokenizer_dir)
  tokenizer_lib.check_same(tiny, other, 'a', 'b')


def changed(tokenizer_dir, path, change):
  """A copy of a tokenizer with its tokenizer.json changed in place."""
  shutil.copytree(tokenizer_dir, path)
  content = json.loads((path / 'tokenizer.json').read_text())
  change(content)
  (path / 'tokenizer.json').write_text(json.dumps(content))
  return tokenizer_lib.load(path)


def test_one_swapped_pair_of_tokens_is_found(
  tiny, tiny_tokenizer_dir, tmp_path
):
  def swap(content):
    vocab = content['model']['vocab']
    vocab['A'], vocab['B'] = vocab['B'], vocab['A']

  other = changed(tiny_tokenizer_dir, tmp_path / 'x', swap)
  assert len(other) == len(tiny)
  first = tiny.convert_tokens_to_ids('A')
  with pytest.raises(
    UserError,
    match=f"a and b .* token {first} is 'A' in the first and 'B' in the other",
  ):
    tokenizer_lib.check_same(tiny, other, 'a', 'b')


def test_an_added_token_is_found(tiny, tiny_tokenizer_dir):
  other = tokenizer_lib.load(tiny_tokenizer_dir)
  other.add_tokens(['<new>'])
  with pytest.raises(UserError, match=r"300 is absent .* and '<new>' in"):
    tokenizer_lib.check_same(tiny, other, 'a', 'b')


def test_one_vocabulary_with_other_splits_is_found(
  tiny, tiny_tokenizer_dir, tmp_path
):
  def drop_merges(content):
    content['model']['merges'] = content['model']['merges'][:1]

  other = changed(tiny_tokenizer_dir, tmp_path / 'x', drop_merges)
  assert other.get_vocab() == tiny.get_vocab()
  with pytest.raises(UserError, match=r'split .* differently; use a teacher'):
    tokenizer_lib.check_same(tiny, other, 'a', 'b')


def test_real_tokenizers_of_one_size_differ(real):
  mistral, tinyllama = real('mistral'), real('tinyllama')
  assert len(mistral) == len(tinyllama)
  with pytest.raises(UserError, match='have different tokenizers: token'):
    tokenizer_lib.check_same(mistral, tinyllama, 'mistral', 'tinyllama')
  tokenizer_lib.check_same(real('qwen3'), real('qwen3'), 'a', 'b')


@pytest.mark.parametrize('template', ['gakd', 'alpaca', 'chat', 'raw'])
def test_fit_prompt_cuts_the_middle_of_the_input(tiny, template):
  row = Row('Sum up.', 'START ' + 'many words ' * 200 + 'END', where='f:1')
  whole, _ = tokenizer_lib.encode(tiny, row, template)
  frame, _ = tokenizer_lib.encode(tiny, Row('Sum up.', 'x'), template)
  length = len(frame) + 60
  ids = tokenizer_lib.fit_prompt(tiny, row, template, length)
  assert length - 8 < len(ids) <= length
  text, frame_text = tiny.decode(ids), tiny.decode(frame)
  before, after = frame_text.rsplit('x', 1)
  assert text.startswith(f'{before}START many')
  assert text.endswith(f'words END{after}')
  assert tokenizer_lib.fit_prompt(tiny, row, template, len(whole)) == whole


def test_fit_prompt_without_input_cuts_the_instruction(tiny):
  row = Row('START ' + 'many words ' * 200 + 'END')
  text = tiny.decode(tokenizer_lib.fit_prompt(tiny, row, 'gakd', 200))
  assert '### Instruction:\nSTART many' in text
  assert text.endswith('words END' + GAKD_END)
  # An input that cannot save the prompt goes first.
  row = dataclasses.replace(row, input='spare ' * 5)
  text = tiny.decode(tokenizer_lib.fit_prompt(tiny, row, 'gakd', 200))
  assert 'spare' not in text
  assert text.endswith('words END' + GAKD_END)


GAKD_END = (
  '\n\n### Response:\n<|im_end|><|im_start|>Assistant:\n<think>\n\n</think>\n\n'
)


def test_fit_prompt_cuts_the_longest_message(tiny):
  row = Row(
    'And now?',
    messages=(
      {'role': 'system', 'content': 'Be brief.'},
      {'role': 'user', 'content': 'START ' + 'word ' * 300 + 'END'},
      {'role': 'assistant', 'content': 'Well.'},
      {'role': 'user', 'content': 'And now?'},
    ),
  )
  ids = tokenizer_lib.fit_prompt(tiny, row, 'chat', 120)
  text = tiny.decode(ids)
  assert len(ids) <= 120
  for kept in ('Be brief.', 'user\nSTART', 'END<|im_end|>', 'Well.'):
    assert kept in text
  assert text.endswith('And now?<|im_end|>\n<|im_start|>assistant\n')
  assert 'START' in row.messages[1]['content']  # The row itself is unchanged.


def test_fit_prompt_with_no_room_for_the_template(tiny):
  row = Row('word ' * 50, where='f.jsonl:7')
  with pytest.raises(UserError, match=r'f.jsonl:7: .*gakd.* max_prompt_length'):
    tokenizer_lib.fit_prompt(tiny, row, 'gakd', 20)
  row = Row('x', messages=({'role': 'user', 'content': 'x'},) * 2)
  with pytest.raises(BadRow, match='one user turn'):
    tokenizer_lib.fit_prompt(tiny, row, 'raw', 20)


def test_fit_prompt_on_real_rows(shared_dir, real):
  tokenizer = real('qwen3')
  rows, _ = load(shared_dir / 'data/sinst_11')
  rows = sorted(rows, key=lambda row: -len(row.input))[:20]
  suffix = '<|im_start|>assistant\n<think>\n\n</think>\n\n'
  for row in rows:
    length = len(tokenizer_lib.encode(tokenizer, row, 'qwen3')[0]) - 40
    ids = tokenizer_lib.fit_prompt(tokenizer, row, 'qwen3', length)
    assert length - 8 <= len(ids) <= length
    text = tokenizer.decode(ids)
    assert text.startswith(f'<|im_start|>user\n{row.instruction}\n')
    assert text.endswith(f'{row.input[-10:]}<|im_end|>\n{suffix}')


@pytest.mark.parametrize(
  ('text', 'answer'),
  [
    (' Crow ', 'Crow'),
    ('Crow<|im_end|>Raven', 'Crow'),
    ('<|im_end|>', ''),
    ('Crow<|endoftext|>', 'Crow'),
    ('<think>\nHm.\n</think>\n\nCrow', 'Crow'),
    ('Hm.</think>Crow', 'Crow'),  # The prompt opened the block.
    ('<think>still at it', ''),
    ('a , b . c', 'a , b . c'),  # No tidying of blanks.
    ('2 < 3 <b>', '2 < 3 <b>'),
  ],
)
def test_decode(tiny, text, answer):
  ids = tiny(text, add_special_tokens=False).input_ids
  assert tokenizer_lib.decode(tiny, ids) == answer


def test_decode_stops_at_both_ends(tiny, real):
  ids = tiny('a<|im_end|>b<|endoftext|>c').input_ids
  tiny.eos_token = '<|endoftext|>'
  assert tokenizer_lib.decode(tiny, ids) == 'a'
  gpt2 = real('gpt2')
  ids = gpt2('Crow<|endoftext|>Raven').input_ids
  assert tokenizer_lib.decode(gpt2, ids) == 'Crow'
  qwen3 = real('qwen3')
  ids = qwen3(
    '<think>\n\nHm\n</think>\n\nCrow<|im_end|><|endoftext|>'
  ).input_ids
  assert tokenizer_lib.decode(qwen3, ids) == 'Crow'


ENDS = ('<|im_end|>', '<|im_start|>', '<|endoftext|>')


@pytest.mark.parametrize('template', ['chat', 'alpaca', 'gakd', 'qwen3'])
def test_what_looks_like_a_special_token_is_text(tiny, template):
  said = f'a {"".join(ENDS)} b'
  special = set(tiny.convert_tokens_to_ids(ENDS))
  row = Row(said, '', (said,))
  prompt, response = tokenizer_lib.encode(tiny, row, template)
  assert tiny.decode(response) == f'{said}<|im_end|>'
  assert not special & set(response[:-1])
  assert tiny.decode(prompt) == templates.prompt_text(template, row, tiny)
  plain, _ = tokenizer_lib.encode(tiny, Row('a b'), template)
  count = {i: plain.count(i) for i in special}
  assert {i: prompt.count(i) for i in special} == count
  assert tokenizer_lib.fit_prompt(tiny, row, template, 500) == prompt
  turns = tuple(
    {'role': role, 'content': said} for role in ('user', 'assistant', 'user')
  )
  if template == 'chat':
    prompt, _ = tokenizer_lib.encode(tiny, Row('x', messages=turns), 'chat')
    assert prompt.count(tiny.eos_token_id) == 3
    assert tiny.decode(prompt).count(said) == 3


def test_a_raw_prompt_is_taken_as_it_is(tiny):
  row = Row('<|im_start|>user\nHi<|im_end|>\n', references=('<|im_end|>',))
  prompt, response = tokenizer_lib.encode(tiny, row, 'raw')
  assert prompt == tiny(row.instruction, add_special_tokens=False).input_ids
  assert prompt.count(tiny.eos_token_id) == 1
  assert response.count(tiny.eos_token_id) == 1


def test_other_texts_are_tokenised_as_the_chat_template_would(real):
  tokenizer = real('qwen3')
  row = Row('Is 2 < 3 in\n\nHTML </b> <|x|>?', references=('Yes, <b>\n',))
  prompt, response = tokenizer_lib.encode(tokenizer, row, 'chat')
  assert prompt == tokenizer.apply_chat_template(
    [{'role': 'user', 'content': row.instruction}],
    add_generation_prompt=True,
    return_dict=False,
  )
  assert response[:-1] == tokenizer(row.references[0]).input_ids


def post_processed(path, tokenizer_dir, template):
  """A tokenizer that puts special tokens around what it reads."""

  def change(content):
    content['post_processor'] = {
      'type': 'TemplateProcessing',
      'single': [
        {'Sequence': {'id': 'A', 'type_id': 0}}
        if part == 'A'
        else {'SpecialToken': {'id': part, 'type_id': 0}}
        for part in template
      ],
      'pair': [],
      'special_tokens': {
        t: {'id': t, 'ids': [i], 'tokens': [t]}
        for t, i in (('<|endoftext|>', 0), ('<|im_end|>', 2))
      },
    }

  return changed(tokenizer_dir, path, change)


@pytest.mark.parametrize(
  ('template', 'start'),
  [
    (['A'], []),
    (['<|endoftext|>', 'A'], [0]),
    (['A', '<|im_end|>'], []),
    (['<|endoftext|>', 'A', '<|im_end|>'], [0]),
  ],
)
def test_nothing_comes_after_a_prompt(
  tmp_path, tiny, tiny_tokenizer_dir, template, start
):
  found = post_processed(tmp_path / 'x', tiny_tokenizer_dir, template)
  assert len(found('a').input_ids) == len(template)
  text = tiny('Name a bird.\nNot a duck.').input_ids
  assert tokenizer_lib.encode(found, ROW, 'raw')[0] == start + text
  assert tokenizer_lib.fit_prompt(found, ROW, 'raw', 99) == start + text
  chat = tokenizer_lib.encode(found, ROW, 'chat')[0]
  assert chat == tokenizer_lib.encode(tiny, ROW, 'chat')[0]


def test_thoughts_that_are_special_tokens_are_cut(tmp_path, tiny_tokenizer_dir):
  tokenizer = tokenizer_lib.load(tiny_tokenizer_dir)
  tokenizer.add_special_tokens(
    {'additional_special_tokens': ['<think>', '</think>']}
  )
  for text, answer in (
    ('<think>hm</think>blue', 'blue'),
    ('hm</think>blue', 'blue'),  # The prompt opened the block.
    ('<think>hm', ''),
    ('blue<think>hm</think>red', 'red'),
    ('hm</think>blue<think>hm', 'blue'),
  ):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer_lib.decode(tokenizer, ids) == answer


def test_thoughts_are_where_the_template_has_them(tiny):
  thought = Row('x', references=('<think>hm</think>blue',), where='f.jsonl:2')
  plain = Row('x', references=('blue',), where='f.jsonl:3')
  with pytest.raises(BadRow, match=r'f.jsonl:2: .*thoughts, which .* closed'):
    tokenizer_lib.encode(tiny, thought, 'gakd')
  _, response = tokenizer_lib.encode(tiny, thought, 'gakd', thinking='keep')
  assert tiny.decode(response[:-1]) == thought.references[0]
  assert tokenizer_lib.encode(tiny, plain, 'gakd')
  # A template that says nothing of thoughts takes both.
  assert tokenizer_lib.encode(tiny, thought, 'chat')
  tiny.chat_template += '{% if add_generation_prompt %}<think>\n{% endif %}'
  with pytest.raises(BadRow, match=r'f.jsonl:3: .*without thoughts, which'):
    tokenizer_lib.encode(tiny, plain, 'chat')
  assert tokenizer_lib.encode(tiny, plain, 'chat', thinking='keep')
  assert tokenizer_lib.encode(tiny, thought, 'chat')
  assert tokenizer_lib.encode(tiny, plain, 'qwen3')  # It closes the block.
  with pytest.raises(UserError, match="thinking='no': use 'refuse' or 'keep'"):
    tokenizer_lib.encode(tiny, plain, 'qwen3', thinking='no')


def test_thoughts_that_are_kept_keep_their_tokens(tiny):
  tiny.add_special_tokens(
    {'additional_special_tokens': ['<think>', '</think>']}
  )
  tags = tiny.convert_tokens_to_ids(['<think>', '</think>'])
  row = Row('x', references=('<think>hm</think>blue',))
  _, response = tokenizer_lib.encode(tiny, row, 'gakd', thinking='keep')
  assert [i for i in response if i in tags] == tags
  _, response = tokenizer_lib.encode(tiny, row, 'chat')  # as text
  assert not set(tags) & set(response)


def test_ids_are_counted_by_the_largest(tiny, tmp_path, tiny_tokenizer_dir):
  def leave_a_hole(content):
    vocab = content['model']['vocab']
    vocab[max(vocab, key=vocab.get)] = 400
    content['model']['merges'] = []

  assert tokenizer_lib.size(tiny) == len(tiny) == 300
  found = changed(tiny_tokenizer_dir, tmp_path / 'x', leave_a_hole)
  assert (len(found), tokenizer_lib.size(found)) == (300, 401)
