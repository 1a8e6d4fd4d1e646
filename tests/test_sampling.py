import collections
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError, sampler, sampling, sharding, streaming
from gakd_jax.models import decoding, transformer

V = 32
CONFIG = transformer.DecoderConfig(
  vocab_size=V,
  width=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  ff_width=48,
  tied_head=True,
  rope_theta=1e4,
  norm_eps=1e-6,
  max_length=256,
)
# Two buckets of padded length, and more rows than a batch.
LENGTHS = (5, 1, 3, 17, 70)
PROMPTS = [np.random.default_rng(n).integers(0, V, n).tolist() for n in LENGTHS]
SHORT = PROMPTS[:3]  # One batch, one bucket: one compilation.


def make_model(seed):
  definition, params = transformer.split(
    transformer.Decoder(CONFIG, nnx.Rngs(seed))
  )
  params['final_norm']['scale'] *= 2.0  # Logits that spread over some nats.
  return nnx.merge(definition, params)


@pytest.fixture(scope='module')
def model():
  return make_model(0)


def generate(model, prompts=PROMPTS, **kwargs):
  return streaming.generate(
    decoding.unstack(model),
    prompts,
    **{'max_new_tokens': 9, 'batch_size': 3} | kwargs,
  )


# Decoding.


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_tokens_are_those_of_the_full_forward(model, temperature):
  """Through the cache, token by token, for rows of different length."""
  seed = 5
  responses = generate(model, temperature=temperature, seed=seed)
  assert [len(r) for r in responses] == [9] * len(PROMPTS)
  full = jax.jit(model.logits)
  for i, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
    ids = prompt + response
    padded = np.zeros((1, 80), np.int32)  # Causal: what follows is not seen.
    padded[0, : len(ids)] = ids
    logits_TV = np.asarray(full(padded))[0]
    row_key = jax.random.fold_in(jax.random.key(seed), i)
    for step, token in enumerate(response):
      score_V = logits_TV[len(prompt) + step - 1]
      # Equal up to rounding: a near tie may go either way.
      if temperature:
        u = jax.random.uniform(jax.random.fold_in(row_key, step))
        cdf_V = np.cumsum(np.asarray(jax.nn.softmax(score_V), 'f8'))
        below = cdf_V[token - 1] if token else 0
        assert below - 1e-5 < u < cdf_V[token] + 1e-5, (i, step)
      else:
        assert score_V[token] > np.max(score_V) - 1e-4, (i, step)


def test_a_sample_depends_on_its_index_and_seed_alone(model):
  """Not on batch size, padding, or what the other prompts are.

  Exact, though rounding may differ with the shape: a tie near enough to notice
  has odds of about one in a million per token here.
  """
  expected = generate(model)  # One row of the first batch has 70 tokens.
  assert generate(model, batch_size=99) == expected
  assert generate(model, SHORT) == expected[:3]
  others = [p[:2] if i != 1 else p for i, p in enumerate(PROMPTS)]
  assert generate(model, others)[1] == expected[1]
  assert generate(model, seed=1) != expected
  same = generate(model, [PROMPTS[0]] * 3)
  assert len({tuple(r) for r in same}) == 3, 'each index draws its own'


def test_each_row_ends_at_its_eos(model):
  plain = generate(model)
  counts = collections.Counter(i for r in plain for i in set(r))
  eos_ids = [i for i, n in counts.most_common(2)]

  def cut(response):
    return next(
      (response[:n] for n, i in enumerate(response) if i in eos_ids), response
    )

  expected = [cut(r) for r in plain]
  assert len({len(r) for r in expected}) > 2, 'rows must end apart'
  assert any(len(r) == 9 for r in expected), 'one row must not end'
  assert generate(model, eos_ids=eos_ids) == expected
  kept = generate(model, eos_ids=eos_ids, keep_end=True)
  assert kept == [
    whole[: len(response) + 1]
    for whole, response in zip(plain, expected, strict=True)
  ]


def test_responses_come_as_they_end_and_go_on_where_they_were(model):
  settings = {'max_new_tokens': 9, 'seed': 5, 'batch_size': 2}
  model = decoding.unstack(model)
  parts = list(streaming.stream(model, PROMPTS, **settings))
  whole = {i: r for part in parts for i, r in zip(*part, strict=True)}
  assert sorted(whole) == list(range(len(PROMPTS)))
  assert sum(len(rows) for rows, _ in parts) == len(PROMPTS)
  assert len(parts) > 2
  # The longest prompts come first.
  assert set(parts[0][0]) <= {4, 3}
  # With any of them there, the others come, and are the same.
  for done in ({*parts[0][0], 10**6}, {0}, {4, 1}):
    rest = streaming.stream(model, PROMPTS, **settings, done=done)
    found = {i: r for part in rest for i, r in zip(*part, strict=True)}
    assert found == {i: r for i, r in whole.items() if i not in done}
  everything = set(range(len(PROMPTS)))
  assert not list(streaming.stream(model, PROMPTS, **settings, done=everything))


@pytest.mark.slow
def test_a_long_response_does_not_hold_the_others(model, monkeypatch):
  """A row that has ended is another's: tokens are read for few that rest."""
  prompts = [[n % V, (5 * n) % V, (3 * n + 1) % V] for n in range(24)]
  lengths = [len(r) for r in generate(model, prompts, max_new_tokens=64)]
  assert lengths == [64] * 24
  eos_ids = (1, 2, 4)
  steps = []
  read_last = sampling.read_last

  def counted(reader, state):
    jax.debug.callback(lambda n: steps.append(int(n)), jnp.sum(~state.done_B))
    return read_last(reader, state)

  monkeypatch.setattr(sampling, 'read_last', counted)
  responses = generate(
    model, prompts, max_new_tokens=64, eos_ids=eos_ids, batch_size=8, seed=3
  )
  jax.effects_barrier()
  lengths = sorted(map(len, responses))
  assert lengths[0] < 10 < 30 < lengths[-1]
  # Batches of eight that wait for their longest would take more steps.
  written = sum(min(n + 1, 64) for n in map(len, responses))
  assert sum(steps) == written
  waiting = sum(
    max(min(len(responses[i]) + 1, 64) for i in range(n, n + 8))
    for n in range(0, 24, 8)
  )
  assert len(steps) < waiting
  alone = generate(
    model, prompts, max_new_tokens=64, eos_ids=eos_ids, batch_size=24, seed=3
  )
  assert responses == alone


def test_decoding_stops_with_the_last_row(model):
  """Rows that fill up the batch are not waited for, and stay empty."""
  steps = []

  @dataclasses.dataclass(frozen=True)
  class Counting(sampler.Sampler):
    def draw(self, logits_BV, key_B):
      jax.debug.callback(lambda: steps.append(1))
      # Row 0 says 1, 2, 3 ...; row 1 says 3 at once; row 2 is not there.
      return jnp.array([1, 3, 1]) + jnp.array([1, 0, 0]) * self.said(logits_BV)

    def filter(self, logits_BV, ids_BS, length_B):
      return length_B

    def said(self, length_B):
      return length_B - 2

  prompt_BT = np.zeros((3, 4), np.int32)
  length_B = np.array([2, 4, 0], np.int32)
  keys = jax.random.split(jax.random.key(0), 3)
  ids_BS, end_B = jax.jit(
    lambda: sampling.decode_batch(
      decoding.unstack(model),
      prompt_BT,
      length_B,
      keys,
      Counting(),
      50,
      eos_ids=(3,),
    )
  )()
  jax.effects_barrier()
  assert len(steps) == 3
  np.testing.assert_array_equal(end_B, [5, 5, 0])
  np.testing.assert_array_equal(ids_BS[0, :6], [0, 0, 1, 2, 3, 0])
  np.testing.assert_array_equal(ids_BS[1, :6], [0, 0, 0, 0, 3, 0])
  assert not ids_BS[2].any()


def test_padded_vocabulary_is_never_drawn(model):
  assert max(map(max, generate(model, SHORT))) >= 7
  assert max(map(max, generate(model, SHORT, valid_vocab=7))) < 7


def test_no_ngram_is_repeated_over_prompt_and_response(model):
  def repeats(response, prompt):
    pairs = list(zip(prompt + response, (prompt + response)[1:], strict=False))
    return any(p in pairs[:n] for n, p in enumerate(pairs) if n >= len(prompt))

  settings = {'temperature': 0.3, 'max_new_tokens': 24}
  prompts = [[1, 2, 3, 1], [7]]
  pairs = zip(generate(model, prompts, **settings), prompts, strict=True)
  assert any(repeats(*pair) for pair in pairs)
  blocked = generate(model, prompts, no_repeat_ngram=2, **settings)
  assert not any(repeats(*pair) for pair in zip(blocked, prompts, strict=True))


def test_new_parameters_do_not_recompile(model, caplog):
  other = make_model(1)
  settings = {'temperature': 0.9, 'eos_ids': [3]}  # Of this test alone.
  with jax.log_compiles():
    first = generate(model, SHORT, **settings)
    assert 'jit(_go_on)' in caplog.text
    caplog.clear()
    assert generate(other, SHORT, seed=4, **settings) != first
    assert 'jit(_go_on)' not in caplog.text


def test_a_sharded_model_says_the_same(model):
  definition, params = transformer.split(model)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  params = jax.device_put(params, sharding.shardings(params, mesh))
  sharded = nnx.merge(definition, params)
  # Of four groups of devices the last has no row, and the others wait for it.
  assert generate(sharded, SHORT) == generate(model, SHORT)


@pytest.mark.slow
def test_devices_refill_their_own_rows(model):
  """Eight rows on each of two, whose responses end apart; 40 prompts."""
  definition, params = transformer.split(model)
  mesh = sharding.make_mesh(data=2)
  params = jax.device_put(params, sharding.shardings(params, mesh))
  prompts = [[n % V, (5 * n) % V, (3 * n + 1) % V] for n in range(40)]
  settings = {'max_new_tokens': 32, 'eos_ids': (1, 2, 4), 'batch_size': 16}
  want = generate(model, prompts, **settings)
  assert len({len(r) for r in want}) > 5
  sharded = nnx.merge(definition, params)
  assert generate(sharded, prompts, **settings) == want
  # Groups of two prompts on each device, in which the same ones stand together.
  prompts = [prompts[n % 9] for n in range(40)]
  want = generate(model, prompts, **settings)
  assert generate(sharded, prompts, **settings) == want


@pytest.mark.slow
def test_a_prompt_is_read_once_for_all_its_samples(model, monkeypatch):
  """And each sample is what it is alone, wherever the others stand."""
  samples = [PROMPTS[n % 4] for n in range(16)]
  settings = {'max_new_tokens': 8, 'seed': 2, 'eos_ids': (1, 2, 4)}
  want = generate(model, samples, **settings, batch_size=1)
  assert len({len(r) for r in want}) > 3
  rows = []
  prefill = decoding.prefill

  def counted(model, prompt_BT, slots):
    jax.debug.callback(lambda: rows.append(len(prompt_BT)))
    return prefill(model, prompt_BT, slots)

  monkeypatch.setattr(decoding, 'prefill', counted)
  # All at once, and by groups of two: half of the samples of a prompt each.
  for batch_size, read in ((16, [4]), (8, [1] * 8)):
    rows.clear()
    assert generate(model, samples, **settings, batch_size=batch_size) == want
    jax.effects_barrier()
    assert rows == read


def _calls(lines):
  """The computations that lines of HLO call."""
  for line in lines:
    pattern = r'(?:to_apply|calls|body|condition)=%?([\w.-]+)'
    yield from re.findall(pattern, line)
    for several in re.findall(r'branch_computations={(.*?)}', line):
      yield from re.findall(r'[\w.-]+', several)


def _within_loops(text):
  """The lines of compiled HLO that loops run, through all that they call."""
  lines_of, name = {}, None
  for line in text.splitlines():
    if start := re.match(r'(?:ENTRY )?%?([\w.-]+) .*{$', line):
      name = start[1]
      lines_of[name] = []
    elif name:
      lines_of[name].append(line)
  loops = [x for x in itertools.chain(*lines_of.values()) if ' while(' in x]
  todo, seen = list(_calls(loops)), set()
  while todo:
    name = todo.pop()
    if name not in seen:
      seen.add(name)
      todo += _calls(lines_of[name])
  return [line for name in seen for line in lines_of[name]]


@pytest.mark.parametrize('axes', [{'data': 8}, {'data': 1, 'fsdp': 8}])
def test_no_token_waits_for_another_device(model, axes):
  definition, params = transformer.split(model)
  mesh = sharding.make_mesh(**axes)
  params = jax.device_put(params, sharding.shardings(params, mesh))
  unstacked = decoding.unstack(nnx.merge(definition, params))
  definition, params = transformer.split(unstacked)
  rows = jax.ShapeDtypeStruct(
    (8,), np.int32, sharding=NamedSharding(mesh, P(sharding.BATCH_AXES))
  )

  @jax.jit
  def decode(params, prompt_BT, length_B):
    return sampling.decode_batch(
      nnx.merge(definition, params),
      prompt_BT,
      length_B,
      jax.random.split(jax.random.key(0), 8),
      sampler.Sampler(top_p=0.9, no_repeat_ngram=2),
      16,
      eos_ids=(3,),
      mesh=mesh,
    )

  compiled = decode.lower(params, rows.update(shape=(8, 4)), rows).compile()
  lines = _within_loops(compiled.as_text())
  assert any(' dot(' in line for line in lines), 'the layers are in the loop'
  collective = r' (all-|collective-|reduce-scatter|ragged-)[a-z-]*\('
  assert not [line for line in lines if re.search(collective, line)]


@pytest.mark.slow
def test_a_call_copies_no_parameters():
  """Temporaries are those of tokens, of a model that is larger than they are.

  Slices of stacked layers would be the whole model once more.
  """
  config = dataclasses.replace(CONFIG, width=256, ff_width=1024)
  model = decoding.unstack(transformer.Decoder(config, nnx.Rngs(0)))
  definition, params = transformer.split(model)

  @jax.jit
  def decode(params, prompt_BT, length_B, key_B):
    model = nnx.merge(definition, params)
    return sampling.decode_batch(
      model, prompt_BT, length_B, key_B, sampler.Sampler(), 4
    )

  row = np.zeros((1, 4), np.int32), np.array([4])
  lowered = decode.lower(params, *row, jax.random.split(jax.random.key(0), 1))
  memory = lowered.compile().memory_analysis()
  assert memory.argument_size_in_bytes > 3 * 2**20
  assert memory.temp_size_in_bytes < 2**20


def test_rows_are_written_up_to_their_end():
  state = sampling.start(np.full((4, 2), 9), np.array([1, 2, 0, 2]), 2)
  np.testing.assert_array_equal(state.done_B, [False, False, True, False])
  for tokens in [1, 3, 4, 3], [5, 6, 7, 8], [5, 6, 7, 8]:
    state = sampling.append(state, np.array(tokens), 2, eos_ids=(3,))
  # Row 0 has its two tokens, rows 1 and 3 their EOS, row 2 is not there.
  np.testing.assert_array_equal(state.end_B, [3, 3, 0, 3])
  np.testing.assert_array_equal(
    state.ids_BS, [[9, 1, 5, 0], [9, 9, 3, 0], [9, 9, 0, 0], [9, 9, 3, 0]]
  )
  assert state.done_B.all()


def test_learned_positions_have_an_end():
  """256 of them: 250 of the prompt and 6 new ones fit, 7 do not."""
  config = dataclasses.replace(CONFIG, learned_positions=True)
  model = transformer.Decoder(config, nnx.Rngs(0))
  assert len(generate(model, [[1] * 250], max_new_tokens=6)[0]) == 6
  with pytest.raises(UserError, match='are 257, and the model has 256'):
    generate(model, [[1] * 250], max_new_tokens=7)


def test_nothing_to_do(model):
  assert generate(model, []) == []


@pytest.mark.parametrize(
  ('prompts', 'settings', 'message'),
  [
    ([[1], []], {}, 'prompt 1 .*is empty'),
    ([[1], [2, V]], {}, f'prompt 1 .*token id {V}'),
    ([[1]], {'temperature': -1.0}, 'temperature=-1.0'),
    ([[1]], {'temperature': float('nan')}, 'temperature=nan'),
    ([[1]], {'top_k': -1}, 'top_k=-1'),
    ([[1]], {'top_p': 1.5}, 'top_p=1.5'),
    ([[1]], {'top_p': 0.0}, 'top_p=0.0'),
    ([[1]], {'no_repeat_ngram': -1}, 'no_repeat_ngram=-1'),
    ([[1]], {'valid_vocab': 0}, 'valid_vocab=0'),
    ([[1]], {'max_new_tokens': 0}, 'max_new_tokens=0'),
    ([[1]], {'batch_size': 0}, 'batch_size=0'),
  ],
)
def test_bad_input_is_one_line(model, prompts, settings, message):
  with pytest.raises(UserError, match=message) as error:
    generate(model, prompts, **settings)
  assert '\n' not in str(error.value)
