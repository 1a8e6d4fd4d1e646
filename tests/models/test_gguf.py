"""A .gguf file stands where a model's directory may."""

import json
import types

import gguf
import numpy as np
import pytest
import safetensors.numpy

from gakd_jax import UserError, models
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import families, gguf_files, weight_files
from tests.models import llama_cpp
from tools import convert_weights, make_goldens

# Which kinds the library can also write.
WRITTEN = ('F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0')
READ = ('Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'IQ4_NL', 'IQ4_XS')
TEXTS = (
  'The teacher shows the student 1234 answers,  in "2" ways.',
  "don't DON'T we'LL\n\n\tx = a[10:200]; naïve café 你好 😀",
  ' leading and trailing ',
)
# Sizes that are whole blocks of every kind.
LARGE = make_goldens.CASES['llama_untied'] | {
  'vocab_size': 512,
  'hidden_size': 256,
  'intermediate_size': 256,
  'num_hidden_layers': 1,
}
LLAMA3 = make_goldens.CASES['llama_scaled'] | {
  'rope_scaling': {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  },
  'rope_theta': 500000.0,
}
CASES = {
  name: make_goldens.CASES[name]
  for name in (
    'gpt2',
    'llama_untied',
    'qwen2_tied',
    'qwen2_untied',
    'qwen3_tied',
    'qwen3_untied',
    'gemma',
  )
} | {
  # Which llama.cpp does not write: it is the head's size.
  'gemma2': make_goldens.CASES['gemma2'] | {'query_pre_attn_scalar': 8},
  'large': LARGE,
}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(x, marks=[pytest.mark.slow] * x.startswith(('gpt2', 'qwen2')))
    for x in CASES
  ],
)
def test_is_the_model_that_it_was_made_of(name, tmp_path):
  case = CASES[name]
  tensors = make_goldens.tensors(case)
  file = llama_cpp.write(case, tensors, tmp_path / 'model.gguf')
  want = models.read_config(make_goldens.write_directory(case, tmp_path / 'hf'))
  assert models.read_config(str(file)) == want
  found = safetensors.numpy.load_file(
    models.resolve(str(file)) / 'model.safetensors'
  )
  assert found.keys() == tensors.keys()
  for tensor, x in tensors.items():
    # Its norms: to 1 and back again.
    atol = 1e-7 if case['model_type'].startswith('gemma') else 0
    np.testing.assert_allclose(found[tensor], x, rtol=0, atol=atol)
  ids_BT = np.arange(12).reshape(2, 6)
  a, b = (models.load(x).logits(ids_BT) for x in (file, tmp_path / 'hf'))
  np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('stored', WRITTEN)
def test_quantized_weights_are_what_llama_cpp_computes_with(stored, tmp_path):
  tensors = make_goldens.tensors(LARGE)
  file = llama_cpp.write(LARGE, tensors, tmp_path / 'model.gguf', stored)
  path = models.resolve(str(file))
  found = weight_files.tensors(path / 'model.safetensors')
  kind = gguf.GGMLQuantizationType[stored]
  for name, x in tensors.items():
    got = np.asarray(found[name].mapped(), np.float32)
    if x.ndim == 1:
      np.testing.assert_array_equal(got, x)
      continue
    assert (found[name].dtype == stored) == (stored in ('F16', 'BF16'))
    rows = gguf.quants.quantize(llama_cpp.converted(name, x, LARGE), kind)
    want = gguf.quants.dequantize(rows, kind)
    np.testing.assert_array_equal(
      llama_cpp.converted(name, got, LARGE), want, name
    )
    assert 0 < np.abs(got - x).mean() < 0.2 * np.abs(x).mean()


def test_rope_of_llama_3_is_known_by_its_factors(tmp_path):
  scaling = [*LLAMA3['rope_scaling'].values()][1:]
  factors = factors_of(LLAMA3, *scaling)
  assert 1 == factors.min() < factors.max() == 8
  write = lambda x: llama_cpp.write(  # noqa: E731
    LLAMA3,
    make_goldens.tensors(LLAMA3),
    tmp_path / 'model.gguf',
    more={'rope_freqs.weight': x},
  )
  assert models.read_config(write(factors)).rope_scaling == tuple(scaling)
  with pytest.raises(UserError, match='not those of llama 3'):
    models.read_config(write(factors[::-1].copy()))


def factors_of(case, factor, low, high, length):
  """As llama.cpp's converter computes them."""
  half = np.arange(0, case['head_dim'], 2) / case['head_dim']
  waves = 2 * np.pi * case['rope_theta'] ** half
  smooth = np.clip((length / waves - low) / (high - low), 0, 1)
  return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


@pytest.mark.parametrize(
  ('pre', 'number'),
  [
    ('gpt-2', ['Ġ1', '2', '3']),  # By merges, of which the first is best.
    ('smollm', ['Ġ', '1', '2', '3']),
    ('qwen2', ['Ġ', '1', '2', '3']),
    ('llama-bpe', ['Ġ', '123']),
  ],
)
def test_its_tokenizer_spells_every_text(pre, number, tmp_path):
  case = LARGE
  file = llama_cpp.write(
    case,
    make_goldens.tensors(case),
    tmp_path / 'model.gguf',
    pre=pre,
    chat_template='{{ messages[0].content }}',
    merges=['t h', 'th e', 'Ġ the', 'Ġ 1', '1 2', '12 3'],
    tokens=pieces(case, [*WORDS, '<think>', '<|tool|>']),
    token_type=[3, 3, *[1] * (256 + len(WORDS)), 4, 3, *[1] * 245],
  )
  tokenizer = tokenizer_lib.load(models.tokenizer_dir(str(file)))
  for text in TEXTS:
    ids = tokenizer(text).input_ids
    if pre == 'llama-bpe':  # Which begins where the file does not say.
      assert ids.pop(0) == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == text
  assert tokenizer.tokenize('the the<|im_end|>') == [
    'the',
    'Ġthe',
    '<|im_end|>',
  ]
  assert tokenizer.tokenize(' 123') == number
  # What no merges lead to is a token for llama 3 alone, where it is a word.
  is_one = tokenizer.tokenize(' zoo') == ['Ġzoo']
  assert is_one == (pre == 'llama-bpe')
  ids = tokenizer('<think> the<|tool|>').input_ids
  assert tokenizer.decode(ids, skip_special_tokens=True) == '<think> the'
  assert tokenizer.eos_token == '<|im_end|>'
  assert tokenizer.chat_template == '{{ messages[0].content }}'


WORDS = ('th', 'the', 'Ġthe', '12', '123', 'Ġ1', 'Ġzoo')


def pieces(case, more):
  tokens = ['<|endoftext|>', '<|im_end|>', *llama_cpp.ALPHABET, *more]
  n = case['vocab_size'] - len(tokens)
  return tokens + [f'<unused_{i}>' for i in range(n)]


@pytest.mark.parametrize(
  ('prefix', 'said'),
  [
    (True, {'unknown_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2}),
    (False, {'unknown_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2}),
    # So they are where a file does not say.
    (True, {'bos_token_id': None, 'eos_token_id': None}),
  ],
)
def test_its_sentencepiece_is_sentencepiece(tmp_path, prefix, said):
  import sentencepiece

  rows = tmp_path / 'text.txt'
  rows.write_text('\n'.join(TEXTS * 4), 'utf-8')
  sentencepiece.SentencePieceTrainer.train(
    input=str(rows),
    model_prefix=str(tmp_path / 'sp'),
    vocab_size=400,
    model_type='bpe',
    byte_fallback=True,
    add_dummy_prefix=prefix,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    hard_vocab_limit=False,
    minloglevel=2,
  )
  theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / 'sp.model'))
  n = theirs.vocab_size()
  case = LARGE | {'vocab_size': n}
  kinds = [2, 3, 3, *[1] * (n - 3)]
  kinds = [6 if theirs.is_byte(i) else kind for i, kind in enumerate(kinds)]
  file = llama_cpp.write(
    case,
    make_goldens.tensors(case),
    tmp_path / 'model.gguf',
    model='llama',
    tokens=[theirs.id_to_piece(i) for i in range(n)],
    scores=[theirs.get_score(i) for i in range(n)],
    token_type=kinds,
    add_space_prefix=prefix,
    **said,
  )
  tokenizer = tokenizer_lib.load(models.tokenizer_dir(str(file)))
  for text in (*TEXTS, 'zebra 🦓'):
    ids = tokenizer(text).input_ids
    assert ids == [1, *theirs.encode(text)]
    assert tokenizer.decode(ids[1:]) == text
  assert tokenizer.eos_token == theirs.id_to_piece(2)


@pytest.mark.parametrize('kind', ['gemma', 'gemma2'])
def test_its_runs_of_blanks_are_tokens(kind, tmp_path):
  """Which the converter writes as blanks, to be found in a text as they are."""
  tokens = ['<pad>', '<eos>', '<bos>', '<unk>', '  ', '   ', '\n\n', '▁', 'a']
  tokens += ['b', '▁a', *(f'<0x{i:02X}>' for i in range(149))]
  case = CASES[kind]
  file = llama_cpp.write(
    case,
    make_goldens.tensors(case),
    tmp_path / 'model.gguf',
    model='llama',
    tokens=tokens,
    scores=[0.0] * len(tokens),
    token_type=[3] * 3 + [2] + [4] * 3 + [1] * 4 + [6] * 149,
    unknown_token_id=3,
    bos_token_id=2,
    add_space_prefix=False,
  )
  tokenizer = tokenizer_lib.load(models.tokenizer_dir(str(file)))
  assert len(tokenizer) == len(tokens)
  ids = tokenizer('a a  b   a\n\n').input_ids
  assert [tokens[i] for i in ids] == [
    *('<bos>', 'a', '▁a', '  ', 'b', '   ', 'a', '\n\n'),
  ]
  assert tokenizer.decode(ids[1:]) == 'a a  b   a\n\n'


@pytest.mark.parametrize('kind', [4, 5])  # of older and of newer converters
@pytest.mark.parametrize('model', ['gpt2', 'llama'])
def test_rows_without_a_token_are_none(kind, model, tmp_path):
  """As in Qwen's files: its embedding has more rows than there are tokens."""
  tokens = ['<unk>', '<|end|>', *llama_cpp.ALPHABET, '▁', 'ab']
  n, rows = len(tokens), LARGE['vocab_size']
  said = {'model': model, 'merges': ['a b'], 'unknown_token_id': 0}

  def read(name, padding):
    file = llama_cpp.write(
      LARGE,
      make_goldens.tensors(LARGE),
      tmp_path / name,
      tokens=tokens + padding,
      token_type=[3, 3] + [1] * (n - 2) + [kind] * len(padding),
      scores=[0.0] * (n + len(padding)),
      **said,
    )
    return tokenizer_lib.load(models.tokenizer_dir(str(file)))

  padded = read('padded.gguf', [f'[PAD{i}]' for i in range(n, rows)])
  assert tokenizer_lib.size(padded) == n < rows
  assert tokenizer_lib.are_same(padded, read('whole.gguf', []))
  assert len(padded.tokenize(f'[PAD{n}]')) > 1
  # A token that is only called so has its place.
  assert tokenizer_lib.size(read('named.gguf', [f'[PAD{n + 1}]'])) == n + 1


@pytest.mark.parametrize('stored', ['F32', 'BF16', 'Q8_0'])
def test_its_config_has_the_dtype_of_its_matrices(stored, tmp_path):
  file = llama_cpp.write(
    LARGE, make_goldens.tensors(LARGE), tmp_path / 'model.gguf', stored
  )
  found = json.loads((models.resolve(str(file)) / 'config.json').read_text())
  assert found['dtype'] == {'BF16': 'bfloat16'}.get(stored, 'float32')


def test_what_a_file_leaves_out_is_as_in_llama_cpp(tmp_path):
  case = CASES['llama_untied'] | {'num_key_value_heads': 4}
  left_out = dict.fromkeys(
    ('{}.attention.head_count_kv', '{}.rope.freq_base', '{}.rope.scaling.type')
  )
  file = llama_cpp.write(
    case, make_goldens.tensors(case), tmp_path / 'model.gguf', keys=left_out
  )
  found = models.read_config(str(file))
  assert (found.kv_heads, found.head_dim, found.rope_theta) == (4, 12, 1e4)
  case = CASES['gpt2']
  file = llama_cpp.write(
    case, make_goldens.tensors(case), tmp_path / 'gpt2.gguf', pre='default'
  )
  assert tokenizer_lib.load(models.tokenizer_dir(str(file)))


def test_is_made_once_and_again_when_it_changes(tmp_path, monkeypatch):
  case = CASES['qwen3_tied']
  tensors = make_goldens.tensors(case)
  file = llama_cpp.write(case, tensors, tmp_path / 'model.gguf')
  first = models.resolve(str(file))
  identity = models.identity(str(file))
  monkeypatch.setattr(gguf_files, 'write', None)
  assert models.resolve(str(file)) == first
  monkeypatch.undo()
  tensors['model.norm.weight'] = 2 * tensors['model.norm.weight']
  llama_cpp.write(case, tensors, file)
  assert models.resolve(str(file)) != first
  assert models.identity(str(file)) != identity


def test_a_tool_writes_its_directory(tmp_path, capsys):
  case = CASES['qwen2_tied']
  file = llama_cpp.write(
    case, make_goldens.tensors(case), tmp_path / 'model.gguf'
  )
  there = tmp_path / 'hf'
  convert = convert_weights.main
  assert convert(['from_gguf', str(file), str(there)]) == 0
  assert json.loads((there / 'config.json').read_text())['dtype'] == 'float32'
  kept = models.resolve(str(file))
  for name in ('model.safetensors', 'config.json', 'tokenizer.json'):
    assert (there / name).read_bytes() == (kept / name).read_bytes()
  small = tmp_path / 'small'
  argv = ['from_gguf', str(file), str(small), '--dtype', 'bfloat16']
  assert convert(argv) == 0
  assert models.load(small).dtype == 'bfloat16'
  assert convert(['from_gguf', str(there), str(tmp_path / 'x')]) == 2
  assert 'not a .gguf file' in capsys.readouterr().err
  assert sorted(x.name for x in tmp_path.iterdir()) == [
    'hf',
    'model.gguf',
    'small',
  ]


def test_what_is_no_model_that_is_known_is_refused(tmp_path, monkeypatch):
  file = tmp_path / 'model.gguf'
  case = CASES['qwen2_tied']
  tensors = make_goldens.tensors(case)

  def refused(match, case=case, tensors=tensors, **said):
    llama_cpp.write(case, tensors, file, **said)
    with pytest.raises(UserError, match=match) as e:
      models.load(str(file))
    assert '\n' not in str(e.value)
    assert str(file) in str(e.value)

  refused("pre 'deepseek-llm' is not supported", pre='deepseek-llm')
  refused("pre 'default' is not supported", pre='default')
  refused('token_id is 1000, and there are 160', eos_token_id=1000)
  refused('scores has 2 numbers', model='llama', scores=[0.0, 1.0])
  refused('make no model', merges=['t h'])
  refused('a token twice', tokens=['a'] * 160)
  refused('token_type has 2 numbers', token_type=[1, 1])
  for key, value, said in (
    ('split.count', 3, 'one of 3 parts; join them'),
    ('{}.rope.scaling.factor', 4.0, "scaling 'linear' by 4.0 is not"),
    ('{}.rope.scale_linear', 2.0, "scaling 'linear' by 2.0 is not"),
    ('{}.rope.scaling.type', 'yarn', "scaling 'yarn' by 1.0 is not"),
    ('{}.rope.dimension_count', 2, 'rope of 2 of 12 dimensions'),
    ('{}.attention.head_count', None, 'has no qwen2.attention.head_count'),
    ('{}.attention.head_count', 12, 'numbers where its metadata say'),
    ('{}.attention.head_count', [4, 4, 4], 'make no model'),
    ('{}.feed_forward_length', 81, 'numbers where its metadata say'),
  ):
    refused(said, keys={key: value})
  refused("tokenizer 'bert' is not supported", model='bert')
  refused('not expected in a qwen2: x', more={'x': np.ones(3, np.float32)})
  few = {k: x for k, x in tensors.items() if 'layers.2.mlp' not in k}
  refused('3 tensors are missing in a qwen2: blk.2.ffn', tensors=few)
  bad = tensors | {'model.norm.weight': np.full(48, np.nan, np.float32)}
  refused('values that are not finite', tensors=bad)
  content = file.read_bytes()
  file.write_bytes(content.replace(b'qwen2', b'mamba'))
  with pytest.raises(UserError, match="'mamba' is not supported"):
    models.load(str(file))
  for n in (0, 3, 1000, len(content) // 2):
    file.write_bytes(content[:n])
    with pytest.raises(UserError, match=r'not a readable .gguf file'):
      models.load(str(file))
  assert not [x for x in gguf_files.store.default_root().parent.glob('*/*.tmp')]
  for missing in ('other.gguf', 'x' * 300 + '.gguf', '~nobody/x.gguf'):
    with pytest.raises(UserError, match='no such directory'):
      models.load(str(tmp_path / missing) if missing[0] != '~' else missing)


@pytest.mark.torch
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
  'name', [*sorted({*CASES} - {'gemma'}), *WRITTEN, *READ]
)
def test_transformers_reads_the_same(name, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  transformers.logging.disable_progress_bar()
  case = CASES.get(name, LARGE)
  file = tmp_path / 'model.gguf'
  stored = 'F32' if name in CASES else name
  tensors = make_goldens.tensors(case)
  if stored in READ:
    write_blocks(case, tensors, file, stored)
  else:
    llama_cpp.write(case, tensors, file, stored)
  # Of the file it reads neither GPT-2's length, nor Qwen3's head_dim, nor
  # Gemma 2's caps; and no Gemma.
  hf = make_goldens.write_directory(case, tmp_path / 'hf')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path,
    gguf_file=file.name,
    dtype='float32',
    config=transformers.AutoConfig.from_pretrained(hf),
  )
  family = families.FAMILIES[case['model_type']]
  path = models.resolve(str(file))
  ours = weight_files.contents(path, family)
  want = theirs.state_dict()
  for tensor, x in ours.items():
    np.testing.assert_allclose(
      np.asarray(x.mapped(), np.float32),
      want[tensor].float().numpy(),
      rtol=1e-6,
      atol=1e-6,
      err_msg=tensor,
    )
  ids_BT = np.arange(12).reshape(2, 6)
  with torch.no_grad():
    want_BTV = theirs(torch.tensor(ids_BT)).logits.numpy()
  scale = np.abs(want_BTV).max()
  got_BTV = models.load(str(file), 'float32').logits(ids_BT)
  np.testing.assert_allclose(got_BTV / scale, want_BTV / scale, atol=1e-4)


def write_blocks(case, tensors, file, stored):
  """A file of a kind that the library reads but does not write: any blocks."""
  kind = gguf.GGMLQuantizationType[stored]
  n, size = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(0)
  quantize = gguf.quants.quantize

  def blocks(x, to):
    if to != kind:
      return quantize(x, to)
    shape = (len(x), x.shape[1] // n * size)
    # Of bytes so small, no half is infinite.
    return rng.integers(0, 32, shape, np.uint8)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gguf.quants, 'quantize', blocks)
    llama_cpp.write(case, tensors, file, stored)


@pytest.mark.parametrize(('n', 'scalar'), [(46, 18), (42, 12)])
def test_the_largest_gemma_2_alone_scales_queries_by_its_width(n, scalar):
  """As llama.cpp: by width / heads, and not by the size of a head."""
  sizes = {
    'embedding_length': 72,
    'block_count': n,
    'feed_forward_length': 80,
    'attention.head_count': 4,
    'attention.head_count_kv': 2,
    'attention.key_length': 12,
    'attention.layer_norm_rms_epsilon': 1e-6,
    'attention.sliding_window': 8,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'context_length': 64,
  }
  said = {f'gemma2.{name}': x for name, x in sizes.items()}
  said['tokenizer.ggml.tokens'] = ['a'] * 160
  embedding = types.SimpleNamespace(shape=(72, 160))
  found = gguf_files._config('gemma2', said, {'token_embd.weight': embedding})
  assert found['query_pre_attn_scalar'] == scalar
