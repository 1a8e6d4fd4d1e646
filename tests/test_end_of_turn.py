"""A student stops where its template ends a turn, here and in transformers.

Models that know one answer by heart: each token of it leads to the next, and
its end to the first again. Whoever does not stop there says it twice.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gakd_jax import models, streaming
from gakd_jax.data import encoding, templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import Row
from gakd_jax.models import decoding, prompts
from gakd_jax.models.transformer import split

ANSWER = 'My crow'
ROW = Row('Which bird?', references=(ANSWER,))
WIDTH = 32
REAL = ('gpt2', 'mistral', 'qwen3', 'tinyllama')
# A chat template, the tokenizer's EOS, and what it writes after an answer.
MADE = {
  'chatml on a base': (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}'
    '<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}',
    '<|endoftext|>',
    '<|im_end|>',
  ),
  'gemma': (
    '{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}'
    '<end_of_turn>\n{% endfor %}'
    '{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}',
    '<eos>',
    '<end_of_turn>',
  ),
  'llama 3': (
    '{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>'
    '\n\n{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}'
    '<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}',
    '<|end_of_text|>',
    '<|eot_id|>',
  ),
  'phi': (
    '{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n'
    '{% endfor %}{% if add_generation_prompt %}<|assistant|>\n'
    '{% else %}<|endoftext|>{% endif %}',
    '<|endoftext|>',
    '<|end|>',
  ),
}


@pytest.fixture
def student(tmp_path):
  """`student(tokenizer_dir, template)`: the directory of one."""

  def make(tokenizer_dir, name):
    tokenizer = tokenizer_lib.load(tokenizer_dir)
    prompt, response = encoding.encode(tokenizer, ROW, name)
    steps = [*response, response[0]]
    leads = dict(itertools.pairwise(steps))
    assert len(leads) == len(response), 'a token occurs twice'
    leads[prompt[-1]] = response[0]
    config = models.DecoderConfig(
      vocab_size=304 if tokenizer_lib.size(tokenizer) <= 304 else 151936,
      width=WIDTH,
      layers=1,
      heads=1,
      kv_heads=1,
      head_dim=8,
      ff_width=8,
      tied_head=False,
      rope_theta=1e4,
      norm_eps=1e-6,
      max_length=256,
    )
    definition, shapes = split(models.abstract(config, tokenizer_dir))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    params['final_norm']['scale'] = jnp.ones(WIDTH)
    for i, (token, following) in enumerate(leads.items()):
      params['embedding'] = params['embedding'].at[token, i].set(1)
      params['head_weight'] = params['head_weight'].at[following, i].set(1)
    path = tmp_path / 'best'
    models.save(
      nnx.merge(definition, params),
      path,
      describe=lambda directory: prompts.say_template(directory, name),
    )
    return path

  return make


def our_answer(path, name):
  """Greedily, and where it ended."""
  tokenizer = tokenizer_lib.load(path)
  ids, _ = encoding.encode(tokenizer, ROW, name)
  stops = templates.stop_ids(name, tokenizer)
  (answer,) = streaming.generate(
    decoding.unstack(models.load(path)),
    [ids],
    eos_ids=stops,
    max_new_tokens=24,
    temperature=0,
    valid_vocab=tokenizer_lib.size(tokenizer),
  )
  assert len(answer) < 24
  return encoding.decode(tokenizer, answer)


def their_answer(path):
  """As transformers gives it, knowing nothing of templates."""
  import torch
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  model = transformers.AutoModelForCausalLM.from_pretrained(path)
  ids = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': ROW.instruction}],
    add_generation_prompt=True,
    return_tensors='pt',
    return_dict=False,
  )
  found = model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    do_sample=False,
    max_new_tokens=24,
    pad_token_id=0,
  )[0, ids.shape[1] :]
  assert len(found) < 24
  return tokenizer.decode(found, skip_special_tokens=True)


def names_of(tokenizer_dir):
  has_one = tokenizer_lib.load(tokenizer_dir).chat_template
  return [
    n for n in templates.TEMPLATES if has_one or n not in ('chat', 'qwen3')
  ]


@pytest.fixture
def made(bytes_tokenizer):
  """`made(kind)`: the directory of a small tokenizer of `MADE`."""
  return lambda kind: bytes_tokenizer(*MADE[kind][:2]).name_or_path


@pytest.mark.parametrize(
  'name', ['chat', pytest.param('alpaca', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('kind', MADE)
def test_an_answer_ends_as_the_template_ends_it(made, student, kind, name):
  source = made(kind)
  assert our_answer(student(source, name), name) == ANSWER
  tokenizer = tokenizer_lib.load(source)
  end = MADE[kind][2 if name == 'chat' else 1]
  assert templates.eos_id(name, tokenizer) == tokenizer.convert_tokens_to_ids(
    end
  )


@pytest.mark.slow
@pytest.mark.parametrize('kind', REAL)
def test_an_answer_of_a_real_tokenizer_ends(shared_dir, student, kind):
  source = shared_dir / 'tokenizers' / kind
  for name in names_of(source):
    assert our_answer(student(source, name), name) == ANSWER


@pytest.mark.torch
@pytest.mark.parametrize('kind', [*MADE, *REAL])
def test_transformers_stops_there_too(request, student, kind):
  if kind in MADE:
    source = request.getfixturevalue('made')(kind)
  else:
    source = request.getfixturevalue('shared_dir') / 'tokenizers' / kind
  for name in names_of(source):
    assert their_answer(student(source, name)).strip() == ANSWER
