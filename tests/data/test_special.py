"""What looks like a special token; more of it in test_text_properties."""

import types

import pytest

from gakd_jax import sharding
from gakd_jax.data import encoding, pipeline
from gakd_jax.data.records import BadRow
from gakd_jax.data.sources import Row
from gakd_jax.evals import evaluator
from gakd_jax.evals.multiple_choice import MultipleChoice


@pytest.mark.parametrize('template', ['gakd', 'alpaca', 'chat'])
def test_a_token_that_cannot_be_cut_is_refused(changed, template):
  def add(content):
    added = {**content['added_tokens'][0], 'id': 300, 'content': '\u2603'}
    content['added_tokens'].append(added)

  tokenizer = changed(add)
  for row in (Row('a \u2603'), Row('a', references=('\u2603',))):
    with pytest.raises(BadRow, match="has '\u2603', a special token"):
      encoding.encode(tokenizer, row, template)
  assert encoding.encode(tokenizer, Row('\u2603'), 'raw')[0] == [300]


@pytest.mark.parametrize('template', ['gakd', 'alpaca', 'chat', 'raw'])
def test_what_only_the_tokenizer_reads_as_one_is_refused(changed, template):
  """It lowers the case of a text before it looks for them."""

  def lower(content):
    content['normalizer'] = {'type': 'Lowercase'}
    for token in content['added_tokens']:
      token['normalized'] = True

  tokenizer = changed(lower)
  assert tokenizer.eos_token_id in tokenizer('<|IM_END|>').input_ids
  said = 'a <|IM_END|>'
  for row in (Row(said), Row('a', references=(said,))):
    with pytest.raises(BadRow, match='the tokenizer reads as a special token'):
      encoding.encode(tokenizer, row, template)
  with pytest.raises(BadRow, match='the tokenizer reads as a special token'):
    encoding.fit_prompt(tokenizer, Row(said), template, 500)
  assert encoding.encode(tokenizer, Row('a <|IM'), template)


@pytest.mark.parametrize('template', ['gakd', 'raw'])
@pytest.mark.parametrize('said', ['a\ud800', '\udfff', 'a\U000ffffeb'])
def test_what_is_no_character_is_refused(tiny, template, said):
  for row in (Row(said), Row('a', said), Row('a', references=(said,))):
    with pytest.raises(BadRow, match='has what is no character of Unicode'):
      encoding.encode(tiny, row, template)
  # A model may have written it.
  found = encoding.encode_responses(tiny, [said], [False], template)
  assert '\ufffd' in tiny.decode(found[0])


def test_a_prompt_has_a_token(changed):
  """Of a tokenizer that leaves out what it does not know."""

  def forget(content):
    content['normalizer'] = {
      'type': 'Replace',
      'pattern': {'String': '\u2603'},
      'content': '',
    }

  tokenizer = changed(forget)
  with pytest.raises(BadRow, match='a prompt without a token'):
    encoding.encode(tokenizer, Row('\u2603'), 'raw')
  with pytest.raises(BadRow, match='a prompt without a token'):
    encoding.fit_prompt(tokenizer, Row('\u2603'), 'raw', 9)


def test_options_are_scored_as_text(tiny, monkeypatch):
  options = ['a<|im_end|>', '<|endoftext|>']
  scored = []

  def spy(texts, **_):
    scored.extend(response.tolist() for _, response in texts)
    return ()

  monkeypatch.setattr(pipeline, 'batches', spy)
  monkeypatch.setattr(
    MultipleChoice, '_options', lambda *_: dict(zip('AB', options, strict=True))
  )
  monkeypatch.setattr('gakd_jax.evals.tasks.gold', lambda *_: 'A')
  subject = evaluator.Subject.__new__(evaluator.Subject)
  model = types.SimpleNamespace(learned_positions=False)
  for name, value in {
    'models': types.SimpleNamespace(tokenizer=tiny, student_config=model),
    'mesh': sharding.make_mesh(),
    'template': 'chat',
  }.items():
    object.__setattr__(subject, name, value)
  MultipleChoice('x', (Row('a', references=('A',)),))._scores(
    subject, {}, [[1]]
  )
  assert [tiny.decode(ids) for ids in scored] == options
  assert not set(tiny.all_special_ids) & {i for ids in scored for i in ids}
