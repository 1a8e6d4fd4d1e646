import dataclasses

import pytest

from gakd_jax import UserError
from gakd_jax.data import encoding, templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow, Row, load

ROW = Row('Name a bird.', 'Not a duck.', ('Crow', 'Raven'))


def test_prompt_and_response_are_encoded_apart(tiny):
  prompt, response = encoding.encode(tiny, ROW, 'chat')
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
  prompt, response = encoding.encode(tiny, row, 'raw')
  assert prompt == tiny('h').input_ids
  assert response[:-1] == tiny('e').input_ids


def test_eos_ends_the_response_even_if_it_is_the_pad(tiny):
  tiny.pad_token = tiny.eos_token
  _, response = encoding.encode(tiny, ROW, 'raw')
  assert response == [*tiny('Crow').input_ids, tokenizer_lib.pad_id(tiny)]


def test_a_prompt_alone_has_no_response(tiny):
  row = dataclasses.replace(ROW, references=())
  assert encoding.encode(tiny, row, 'raw')[1] == []


def test_batch_encodes_as_one_by_one(tiny):
  rows = [ROW, Row('Hi'), Row('\u00e9', references=('\U0001f600 ok',))]
  assert encoding.encode_batch(tiny, rows, 'alpaca') == [
    encoding.encode(tiny, row, 'alpaca') for row in rows
  ]
  assert encoding.encode_batch(tiny, [], 'alpaca') == []
  turns = ({'role': 'user', 'content': 'x'},) * 2
  rows[1] = Row('x', messages=turns, references=('y',))
  first, bad, last = encoding.encode_batch(tiny, rows, 'alpaca')
  assert isinstance(bad, BadRow)
  assert first == encoding.encode(tiny, rows[0], 'alpaca')
  assert last == encoding.encode(tiny, rows[2], 'alpaca')


def test_bos_stands_before_plain_prompts_only(real):
  for name in ('mistral', 'tinyllama'):
    prompt, response = encoding.encode(real(name), ROW, 'alpaca')
    assert prompt[0] == 1
    assert prompt.count(1) == 1
    assert 1 not in response
    assert response[-1] == 2
    prompt, _ = encoding.encode(real(name), ROW, 'gakd')
    assert 1 not in prompt
    # A prompt that was rendered has it already.
    rendered = Row('<s>[INST] Hi [/INST]', references=('Ho',))
    for ids in (
      encoding.encode(real(name), rendered, 'raw')[0],
      encoding.fit_prompt(real(name), rendered, 'raw', 99),
    ):
      assert ids[0] == 1
      assert ids.count(1) == 1


def test_real_qwen3_ids(real):
  prompt, response = encoding.encode(real('qwen3'), ROW, 'qwen3')
  assert prompt[:3] == [151644, 872, 198]  # <|im_start|>user\n
  assert prompt[-4:] == [151667, 271, 151668, 271]  # <think> </think>
  assert response[-1] == 151645


@pytest.mark.parametrize('template', ['gakd', 'alpaca', 'chat', 'raw'])
def test_fit_prompt_cuts_the_middle_of_the_input(tiny, template):
  row = Row('Sum up.', 'START ' + 'many words ' * 200 + 'END', where='f:1')
  whole, _ = encoding.encode(tiny, row, template)
  frame, _ = encoding.encode(tiny, Row('Sum up.', 'x'), template)
  length = len(frame) + 60
  ids = encoding.fit_prompt(tiny, row, template, length)
  assert length - 8 < len(ids) <= length
  text, frame_text = tiny.decode(ids), tiny.decode(frame)
  before, after = frame_text.rsplit('x', 1)
  assert text.startswith(f'{before}START many')
  assert text.endswith(f'words END{after}')
  assert encoding.fit_prompt(tiny, row, template, len(whole)) == whole


def test_fit_prompt_without_input_cuts_the_instruction(tiny):
  row = Row('START ' + 'many words ' * 200 + 'END')
  text = tiny.decode(encoding.fit_prompt(tiny, row, 'gakd', 200))
  assert '### Instruction:\nSTART many' in text
  assert text.endswith('words END' + GAKD_END)
  # An input that cannot save the prompt goes first.
  row = dataclasses.replace(row, input='spare ' * 5)
  text = tiny.decode(encoding.fit_prompt(tiny, row, 'gakd', 200))
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
  ids = encoding.fit_prompt(tiny, row, 'chat', 120)
  text = tiny.decode(ids)
  assert len(ids) <= 120
  for kept in ('Be brief.', 'user\nSTART', 'END<|im_end|>', 'Well.'):
    assert kept in text
  assert text.endswith('And now?<|im_end|>\n<|im_start|>assistant\n')
  assert 'START' in row.messages[1]['content']  # The row itself is unchanged.


def test_fit_prompt_with_no_room_for_the_template(tiny):
  row = Row('word ' * 50, where='f.jsonl:7')
  with pytest.raises(UserError, match=r'f.jsonl:7: .*gakd.* max_prompt_length'):
    encoding.fit_prompt(tiny, row, 'gakd', 20)
  row = Row('x', messages=({'role': 'user', 'content': 'x'},) * 2)
  with pytest.raises(BadRow, match='one user turn'):
    encoding.fit_prompt(tiny, row, 'raw', 20)


def test_fit_prompt_on_real_rows(shared_dir, real):
  tokenizer = real('qwen3')
  rows, _ = load(shared_dir / 'data/sinst_11')
  rows = sorted(rows, key=lambda row: -len(row.input))[:20]
  suffix = '<|im_start|>assistant\n<think>\n\n</think>\n\n'
  for row in rows:
    length = len(encoding.encode(tokenizer, row, 'qwen3')[0]) - 40
    ids = encoding.fit_prompt(tokenizer, row, 'qwen3', length)
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
  assert encoding.decode(tiny, ids) == answer


def test_decode_stops_at_both_ends(tiny, real):
  ids = tiny('a<|im_end|>b<|endoftext|>c').input_ids
  tiny.eos_token = '<|endoftext|>'
  assert encoding.decode(tiny, ids) == 'a'
  gpt2 = real('gpt2')
  ids = gpt2('Crow<|endoftext|>Raven').input_ids
  assert encoding.decode(gpt2, ids) == 'Crow'
  qwen3 = real('qwen3')
  ids = qwen3(
    '<think>\n\nHm\n</think>\n\nCrow<|im_end|><|endoftext|>'
  ).input_ids
  assert encoding.decode(qwen3, ids) == 'Crow'


ENDS = ('<|im_end|>', '<|im_start|>', '<|endoftext|>')


@pytest.mark.parametrize('template', ['chat', 'alpaca', 'gakd', 'qwen3'])
def test_what_looks_like_a_special_token_is_text(tiny, template):
  said = f'a {"".join(ENDS)} b'
  special = set(tiny.convert_tokens_to_ids(ENDS))
  row = Row(said, '', (said,))
  prompt, response = encoding.encode(tiny, row, template)
  assert tiny.decode(response) == f'{said}<|im_end|>'
  assert not special & set(response[:-1])
  assert tiny.decode(prompt) == templates.prompt_text(template, row, tiny)
  plain, _ = encoding.encode(tiny, Row('a b'), template)
  count = {i: plain.count(i) for i in special}
  assert {i: prompt.count(i) for i in special} == count
  assert encoding.fit_prompt(tiny, row, template, 500) == prompt
  turns = tuple(
    {'role': role, 'content': said} for role in ('user', 'assistant', 'user')
  )
  if template == 'chat':
    prompt, _ = encoding.encode(tiny, Row('x', messages=turns), 'chat')
    assert prompt.count(tiny.eos_token_id) == 3
    assert tiny.decode(prompt).count(said) == 3


def test_a_raw_prompt_is_taken_as_it_is(tiny):
  row = Row('<|im_start|>user\nHi<|im_end|>\n', references=('<|im_end|>',))
  prompt, response = encoding.encode(tiny, row, 'raw')
  assert prompt == tiny(row.instruction, add_special_tokens=False).input_ids
  assert prompt.count(tiny.eos_token_id) == 1
  assert response.count(tiny.eos_token_id) == 1


def test_other_texts_are_tokenised_as_the_chat_template_would(real):
  tokenizer = real('qwen3')
  row = Row('Is 2 < 3 in\n\nHTML </b> <|x|>?', references=('Yes, <b>\n',))
  prompt, response = encoding.encode(tokenizer, row, 'chat')
  assert prompt == tokenizer.apply_chat_template(
    [{'role': 'user', 'content': row.instruction}],
    add_generation_prompt=True,
    return_dict=False,
  )
  assert response[:-1] == tokenizer(row.references[0]).input_ids


def post_processed(changed, template):
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

  return changed(change)


@pytest.mark.parametrize(
  ('template', 'start'),
  [
    (['A'], []),
    (['<|endoftext|>', 'A'], [0]),
    (['A', '<|im_end|>'], []),
    (['<|endoftext|>', 'A', '<|im_end|>'], [0]),
  ],
)
def test_nothing_comes_after_a_prompt(changed, tiny, template, start):
  found = post_processed(changed, template)
  assert len(found('a').input_ids) == len(template)
  text = tiny('Name a bird.\nNot a duck.').input_ids
  assert encoding.encode(found, ROW, 'raw')[0] == start + text
  assert encoding.fit_prompt(found, ROW, 'raw', 99) == start + text
  chat = encoding.encode(found, ROW, 'chat')[0]
  assert chat == encoding.encode(tiny, ROW, 'chat')[0]


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
    assert encoding.decode(tokenizer, ids) == answer


def test_thoughts_are_where_the_template_has_them(tiny):
  thought = Row('x', references=('<think>hm</think>blue',), where='f.jsonl:2')
  plain = Row('x', references=('blue',), where='f.jsonl:3')
  with pytest.raises(BadRow, match=r'f.jsonl:2: .*thoughts, which .* closed'):
    encoding.encode(tiny, thought, 'gakd')
  _, response = encoding.encode(tiny, thought, 'gakd', thinking='keep')
  assert tiny.decode(response[:-1]) == thought.references[0]
  assert encoding.encode(tiny, plain, 'gakd')
  # A template that says nothing of thoughts takes both.
  assert encoding.encode(tiny, thought, 'chat')
  tiny.chat_template += '{% if add_generation_prompt %}<think>\n{% endif %}'
  with pytest.raises(BadRow, match=r'f.jsonl:3: .*without thoughts, which'):
    encoding.encode(tiny, plain, 'chat')
  assert encoding.encode(tiny, plain, 'chat', thinking='keep')
  assert encoding.encode(tiny, thought, 'chat')
  assert encoding.encode(tiny, plain, 'qwen3')  # It closes the block.
  with pytest.raises(UserError, match="thinking='no': use 'refuse' or 'keep'"):
    encoding.encode(tiny, plain, 'qwen3', thinking='no')


def test_thoughts_that_are_kept_keep_their_tokens(tiny):
  tiny.add_special_tokens(
    {'additional_special_tokens': ['<think>', '</think>']}
  )
  tags = tiny.convert_tokens_to_ids(['<think>', '</think>'])
  row = Row('x', references=('<think>hm</think>blue',))
  _, response = encoding.encode(tiny, row, 'gakd', thinking='keep')
  assert [i for i in response if i in tags] == tags
  _, response = encoding.encode(tiny, row, 'chat')  # as text
  assert not set(tags) & set(response)
