"""Eight host devices, no network, and small things on disk to test with."""

import importlib.metadata
import importlib.util
import os
import re
import socket
import tempfile
from pathlib import Path

# Before anything initialises a backend or opens a hub client.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['HF_HUB_OFFLINE'] = '1'
# What is kept of data sets, by these tests alone.
os.environ['GAKD_JAX_CACHE'] = tempfile.mkdtemp()
# Tiny models compile for longer than they run: this halves it, also for the
# processes that tests start.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
# A third off the compilation of what most tests spend their time compiling.
# XLA ends a process over a flag that it does not know: only where it is known.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_use_fusion_emitters=false'
  )

import jax
import numpy as np
import pytest
from flax import nnx

from gakd_jax import models
from gakd_jax.models.transformer import split
from gakd_jax.sharding import path_name

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# What two tests compile alike is compiled once.
jax.config.update('jax_compilation_cache_dir', tempfile.mkdtemp())
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

# Grouped heads, and a head size that is not width / heads.
TINY = {
  'vocab_size': 304,  # the tokenizer has 300: real models pad theirs too
  'width': 32,
  'layers': 2,
  'heads': 4,
  'kv_heads': 2,
  'head_dim': 16,
  'ff_width': 48,
  'tied_head': True,
  'rope_theta': 1e6,
  'norm_eps': 1e-6,
  'max_length': 512,
}

CHAT_TEMPLATE = (
  '{% for m in messages %}'
  "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
  '{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def pytest_configure(config):
  config.addinivalue_line(
    'markers', 'torch: live comparison with torch and transformers'
  )
  config.addinivalue_line(
    'markers', 'slow: takes most of a minute; run with -m slow'
  )
  config.addinivalue_line(
    'markers', 'targets: compiles for machines that are not here, for minutes'
  )


def pytest_runtest_setup(item):
  has_torch = importlib.util.find_spec('torch') is not None
  if item.get_closest_marker('torch') and not has_torch:
    pytest.skip('torch is not installed (the `parity` extra)')


@pytest.fixture(scope='module', autouse=True)
def _files_leave_nothing():
  yield
  assert jax.sharding.get_mesh().empty, 'a test left its mesh to all others'
  # Each program maps some twenty areas of memory, of which Linux gives a
  # process 65530; a process that has no more of them crashes.
  maps = Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 20_000:
    jax.clear_caches()


@pytest.fixture
def whole_compiler():
  """As it is for users, whose programs are optimised."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def free_port():
  """For processes that find each other."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


@pytest.fixture(
  params=[5, pytest.param(1000, marks=pytest.mark.slow)], ids='{}x'.format
)
def holds(request):
  """`holds(check, **strategies)`: a property, of some examples or of many."""
  import hypothesis

  settings = hypothesis.settings(
    max_examples=request.param,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )

  def holds(check, **strategies):
    settings(hypothesis.given(**strategies)(check))()

  return holds


@pytest.fixture(scope='session')
def shared_dir():
  """Data and tokenizers that are too large for the repository."""
  path = Path(__file__).parents[2] / 'shared'
  if not path.is_dir():
    pytest.skip(f'{path} is not there')
  return path


@pytest.fixture(scope='session')
def tiny_tokenizer_dir(tmp_path_factory):
  """A byte-level BPE tokenizer of 300 tokens with Qwen's specials."""
  import tokenizers
  import transformers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  text = ['The teacher shows the student the answer. system user assistant'] * 4
  tokenizer.train_from_iterator(text, trainer)
  path = tmp_path_factory.mktemp('tokenizer')
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token='<|im_end|>',
    pad_token='<|endoftext|>',
    chat_template=CHAT_TEMPLATE,
  ).save_pretrained(path)
  return path


@pytest.fixture
def bytes_tokenizer(tmp_path):
  """`bytes_tokenizer(chat_template, eos, bos=None)`: a tokenizer of bytes."""
  import tokenizers
  import transformers

  def make(chat_template, eos, bos=None):
    model = tokenizers.models.BPE(
      vocab={
        c: i
        for i, c in enumerate(
          sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        )
      },
      merges=[],
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    found = re.findall(r'<[\w|/]+>', f'{chat_template}{eos}{bos}')
    made.add_special_tokens([t for t in dict.fromkeys(found) if '|{{' not in t])
    path = tmp_path / f'{len(list(tmp_path.iterdir()))}'
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=made,
      eos_token=eos,
      bos_token=bos,
      chat_template=chat_template,
    ).save_pretrained(path)
    return transformers.AutoTokenizer.from_pretrained(path)

  return make


@pytest.fixture(scope='session')
def pieces_tokenizer_dir(tmp_path_factory):
  """A SentencePiece tokenizer of few pieces; other characters are bytes.

  Words begin with U+2581, a text with a blank. No chat template.
  """
  import tokenizers
  import transformers

  folder = tmp_path_factory.mktemp('pieces')
  tokens = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  merges = [('t', 'h'), ('\u2581', 'th'), ('\u2581th', 'e'), ('e', 'r')]
  tokens += [*'\u2581abcdehnorstuw\u4f60', *map(''.join, merges)]
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=merges,
      unk_token='<unk>',
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace('\u2581', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=made,
    unk_token='<unk>',
    bos_token='<s>',
    eos_token='</s>',
  ).save_pretrained(folder)
  return folder


@pytest.fixture(scope='session')
def tiny_model_dir(tmp_path_factory, tiny_tokenizer_dir):
  """`tiny_model_dir(seed=0, dtype='float32', **shape)` -> a new Qwen3 directory.

  Random weights, `TINY`'s shape but for the `DecoderConfig` fields given, and
  the tiny tokenizer or another.
  """

  def make(seed=0, dtype='float32', tokenizer_dir=None, **shape):
    config = models.DecoderConfig(**TINY | shape)
    rng = np.random.default_rng(seed)

    def random(path, x):  # The scale of a usual initialisation.
      name = path_name(path)
      if name.endswith('scale'):
        return np.ones(x.shape, dtype)
      fan_in = 2500 if name in ('embedding', 'head_weight') else x.shape[-2]
      return (rng.standard_normal(x.shape) / fan_in**0.5).astype(dtype)

    source = tokenizer_dir or tiny_tokenizer_dir
    definition, shapes = split(models.abstract(config, source))
    params = jax.tree_util.tree_map_with_path(random, shapes)
    path = tmp_path_factory.mktemp('model') / 'model'
    models.save(nnx.merge(definition, params), path)
    return path

  return make
