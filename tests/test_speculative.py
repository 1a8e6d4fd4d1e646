"""Text that a student drafts and a teacher corrects.

Most tests have tables for models: what follows a token depends on it alone. So
the text is known, and its distribution in closed form.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx, struct

from gakd_jax import keys, sampling, speculative
from gakd_jax.models import decoding, transformer
from gakd_jax.sampler import Sampler
from gakd_jax.speculative import Mixture, Probability, Rank

GREEDY = Sampler(temperature=0.0)


@struct.dataclass
class Table:
  """A reader whose logits after a token are a row of a table."""

  logits_VV: jax.Array

  @property
  def model(self):
    return self

  def head(self, hidden_NV):
    return hidden_NV

  def read(self, ids_BT, positions_BT):
    del positions_BT
    return self.logits_VV[ids_BT], self


@struct.dataclass
class Script(Table):
  """A reader whose logits depend on row and position, [B, S, V]."""

  def read(self, ids_BT, positions_BT):
    rows_B1 = jnp.arange(ids_BT.shape[0])[:, None]
    return self.logits_VV[rows_B1, positions_BT], self


def drafting(rule, gamma, max_new_tokens, eos_ids=(), **samplers):
  samplers = {'student': Sampler(), 'teacher': Sampler()} | samplers
  return speculative.Drafting(
    rule=rule,
    gamma=gamma,
    max_new_tokens=max_new_tokens,
    eos_ids=eos_ids,
    **samplers,
  )


def start(last_B, settings):
  """Rows whose prompts are one token each."""
  prompt_B1 = jnp.asarray(last_B, jnp.int32)[:, None]
  return sampling.start(
    prompt_B1, jnp.ones(len(last_B), jnp.int32), settings.max_new_tokens
  )


def finish(state, trace):
  """Responses [B, I], -1 after their end; which are the teacher's; the trace."""
  state, trace = jax.device_get((state, trace))
  is_text_BI = np.arange(1, state.ids_BS.shape[1]) < state.end_B[:, None]
  ids_BI = np.where(is_text_BI, state.ids_BS[:, 1:], -1)
  by_teacher_BI = trace.by_teacher_BS[:, 1:]
  assert not by_teacher_BI[~is_text_BI].any()
  return ids_BI, by_teacher_BI, trace


def write(readers, last_B, key_B, settings):
  run = jax.jit(functools.partial(speculative.write, settings=settings))
  return finish(*run(readers, start(last_B, settings), key_B))


@pytest.fixture
def numbers(monkeypatch):
  """`numbers(u_student_BI, u_teacher_BI)` -> keys of rows, which draw these."""

  def inject(u_student_BI, u_teacher_BI):
    B, I = u_student_BI.shape
    u_N = jnp.stack([u_student_BI, u_teacher_BI], dtype=jnp.float32).ravel()
    places = {keys.TEACHER: B * I, keys.ACCEPTANCE: 0}

    def fold_in(key, x):
      return key + (places[x] if isinstance(x, int) else x)

    monkeypatch.setattr(jax.random, 'fold_in', fold_in)
    monkeypatch.setattr(jax.random, 'uniform', lambda key: u_N[key])
    return I * jnp.arange(B)

  return inject


# Texts that are known.


def cycle(V, step=1):
  """A table that has token v followed by v + step, for certain."""
  return Table(30.0 * jnp.roll(jnp.eye(V), step, axis=1))


def greedy(rule, gamma, **settings):
  samplers = {'student': GREEDY, 'teacher': GREEDY}
  return drafting(rule, gamma, **settings, **samplers)


def keys_of(n):
  return jax.random.split(jax.random.key(0), n)


@pytest.mark.parametrize('gamma', [1, 2, 8])
def test_an_eos_ends_a_row_wherever_it_stands(gamma):
  """In a draft; as the teacher's token; first; and not if it is rejected."""
  V, eos = 8, 7
  student = jnp.roll(jnp.eye(V), 1, axis=1)  # says v + 1 after v, but:
  student = student.at[0].set(jnp.eye(V)[eos])  # rejected: 0 -> 4
  teacher = student.at[0].set(jnp.eye(V)[4])
  teacher = teacher.at[3].set(jnp.eye(V)[eos])  # where the student says 4
  ids_BI, by_teacher_BI, trace = write(
    [Table(30 * student), Table(30 * teacher)],
    [4, 1, 6, 3, 0],
    keys_of(5),
    greedy(Rank(1), gamma, max_new_tokens=6, eos_ids=(eos,)),
  )
  _ = -1
  np.testing.assert_array_equal(
    ids_BI,
    [
      [5, 6, 7, _, _, _],
      [2, 3, 7, _, _, _],
      [7, _, _, _, _, _],
      [7, _, _, _, _, _],
      [4, 5, 6, 7, _, _],
    ],
  )
  wanted_BI = np.zeros((5, 6), bool)
  wanted_BI[1, 2] = wanted_BI[3, 0] = wanted_BI[4, 0] = True
  np.testing.assert_array_equal(by_teacher_BI, wanted_BI)
  if gamma == 8:
    np.testing.assert_array_equal(trace.blocks_B, [1, 1, 1, 1, 2])
    np.testing.assert_array_equal(trace.judged_BJ.sum(1), [3, 3, 1, 1, 4])


@pytest.mark.parametrize(('gamma', 'step', 'blocks'), [(4, 1, 2), (8, 2, 6)])
def test_a_row_ends_with_its_tokens_in_the_middle_of_a_block(
  gamma, step, blocks
):
  """Six of them, whether the teacher agrees (step 1) or never does."""
  ids_BI, by_teacher_BI, trace = write(
    [cycle(9), cycle(9, step)],
    [0],
    keys_of(1),
    greedy(Rank(1), gamma, max_new_tokens=6),
  )
  np.testing.assert_array_equal(ids_BI[0], step * np.arange(1, 7) % 9)
  assert by_teacher_BI.all() == (step == 2)
  assert by_teacher_BI.any() == (step == 2)
  assert trace.blocks_B[0] == blocks
  assert trace.judged_BJ.sum() == 6


def test_a_row_without_a_prompt_stays_empty_and_is_not_waited_for():
  state = sampling.start(jnp.array([[1], [0]]), jnp.array([1, 0]), 3)
  settings = greedy(Rank(1), 2, max_new_tokens=3)
  state, trace = jax.jit(
    lambda: speculative.write([cycle(9), cycle(9)], state, keys_of(2), settings)
  )()
  np.testing.assert_array_equal(state.end_B, [4, 0])
  np.testing.assert_array_equal(state.ids_BS[0], [1, 2, 3, 4])
  np.testing.assert_array_equal(trace.blocks_B, [2, 0])
  assert not trace.judged_BJ[1].any()
  assert not trace.by_teacher_BS.any()


# What the published implementation's formulas give.


@pytest.fixture(scope='module')
def golden(shared_dir):
  def load(name):
    z = np.load(shared_dir / 'goldens' / f'{name}.npz')
    return {k: z[k] for k in z.files}, json.loads(str(z['meta']))

  return load


@pytest.mark.parametrize('name', ['skd_blocks_a', 'skd_blocks_c_gamma1'])
def test_blocks_are_the_golden_ones(name, golden, numbers):
  z, meta = golden(name)
  draft_BJ, z_BJV = z['in.draft'], z['in.teacher_logits']
  B, J = draft_BJ.shape
  s_BJV = jax.nn.one_hot(draft_BJ, meta['V'])
  u_BJ = z['in.u_teacher'][:, :J]
  keys_B = numbers(u_BJ, u_BJ)

  @jax.jit
  def run(k):
    settings = drafting(Rank(k), J, J, student=GREEDY)
    readers = [Script(s_BJV), Script(jnp.array(z_BJV))]
    return speculative.write(
      readers, start(np.zeros(B), settings), keys_B, settings
    )

  for k in meta['Ks']:
    ids_BJ, by_teacher_BJ, _ = finish(*run(k))
    accepted_B = z[f'out.paper.K{k}.n_accepted']
    first_B = np.argmax(np.c_[by_teacher_BJ, np.ones(B, bool)], axis=1)
    np.testing.assert_array_equal(first_B, accepted_B)
    # Later blocks go on after what the first one left.
    in_block_BJ = np.arange(J) <= accepted_B[:, None]
    np.testing.assert_array_equal(
      np.where(in_block_BJ, ids_BJ, -1), z[f'out.paper.K{k}.tokens']
    )


@pytest.mark.parametrize(
  ('name', 'gamma'),
  [
    *[('skd_decode_a', gamma) for gamma in (1, 3, 5, 8)],
    *[('skd_decode_c_onpolicy', gamma) for gamma in (3, 8)],
  ],
)
def test_texts_are_the_golden_ones(name, gamma, golden, numbers):
  z, meta = golden(name)
  ids_BI, by_teacher_BI, trace = write(
    [Table(jnp.array(z[f'in.{m}_table'])) for m in ('student', 'teacher')],
    z['in.last_prompt_token'],
    numbers(z['in.u_student'], z['in.u_teacher']),
    drafting(Rank(meta['K']), gamma, meta['max_new'], (meta['eos'],)),
  )
  np.testing.assert_array_equal(ids_BI, z['out.tokens'])
  accepted_BI = np.where(ids_BI < 0, -1, ~by_teacher_BI)
  np.testing.assert_array_equal(accepted_BI, z['out.accepted'])
  calls_B = z[f'out.teacher_calls.gamma{gamma}']
  np.testing.assert_array_equal(trace.blocks_B, calls_B)
  # Nothing is counted twice: of the judged, what stayed is what is there.
  kept = np.sum(z['out.accepted'] == 1)
  assert np.sum(trace.kept_BJ) == kept
  assert np.sum(trace.judged_BJ) == kept + np.sum(by_teacher_BI)


# The distribution of a text.


def softmax(z):
  e = np.exp(z - z.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def nucleus(p_V, mass):
  """p over its fewest tokens that have this mass, by sorting."""
  order = np.argsort(-p_V)
  n = 1 + np.searchsorted(np.cumsum(p_V[order]), mass)
  kept_V = np.where(np.isin(np.arange(len(p_V)), order[:n]), p_V, 0)
  return kept_V / kept_V.sum()


def distribution(z_V, temperature=1.0, top_p=1.0):
  p_V = softmax(np.asarray(z_V, np.float64) / temperature)
  return nucleus(p_V, top_p) if top_p < 1 else p_V


def tables(V):
  """Of a student and a teacher, as numpy arrays."""
  return np.random.default_rng(0).normal(size=(2, V, V)).astype(np.float32)


def by_rule(accept, p_V, q_V, z_V):
  """The distribution of a token, by the definition of its rule."""
  if accept == 'mixture':
    return 0.3 * q_V + 0.7 * p_V
  stays_V = {
    'rank': np.argsort(np.argsort(-z_V)) < 2,
    'probability': softmax(z_V) >= 0.2,
  }[accept]
  return q_V * stays_V + (q_V @ ~stays_V) * p_V


@pytest.mark.slow
def test_a_mixed_text_does_not_depend_on_how_far_is_drafted():
  s_VV, t_VV = tables(6)
  want = None
  for gamma in (1, 4):
    got, by_teacher_BI, _ = write(
      [Table(jnp.array(s_VV)), Table(jnp.array(t_VV))],
      np.arange(6),
      keys_of(6),
      drafting(Mixture(0.5), gamma, 20, (0,)),
    )
    if want is not None:
      np.testing.assert_array_equal(got, want)
    want = got
    assert 0.1 < by_teacher_BI.sum() / (got >= 0).sum() < 0.9


RULES = {
  'rank': Rank(2),
  'probability': Probability(0.2),
  'mixture': Mixture(0.7),
}


@pytest.mark.parametrize(
  ('accept', 'student', 'teacher'),
  [
    ('probability', {'top_p': 0.9}, {}),
    ('mixture', {'temperature': 0.7}, {'temperature': 1.5, 'top_p': 0.8}),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('rank', {'temperature': 0.6}, {'temperature': 1.4, 'top_p': 0.9}),
        ('mixture', {'top_p': 0.8}, {}),
        ('mixture', {}, {'temperature': 0.6}),
      )
    ),
  ],
  ids=str,
)
def test_two_tokens_are_distributed_as_their_rule_says(
  accept, student, teacher
):
  """Of many rows that start alike; both are drafted in one block."""
  V, B = 4, 5000
  s_VV, t_VV = tables(V)
  settings = drafting(
    RULES[accept], 2, 2, student=Sampler(**student), teacher=Sampler(**teacher)
  )
  ids_B2, by_teacher_B2, _ = write(
    [Table(jnp.array(s_VV)), Table(jnp.array(t_VV))],
    np.zeros(B),
    jax.random.split(jax.random.key(1), B),
    settings,
  )
  next_VV = np.array(
    [
      by_rule(accept, distribution(z, **teacher), distribution(x, **student), z)
      for x, z in zip(s_VV, t_VV, strict=True)
    ]
  )
  p_N = (next_VV[0][:, None] * next_VV).ravel()
  n_N = np.bincount(ids_B2 @ np.array([V, 1]), minlength=V * V)
  assert np.all(np.abs(by_teacher_B2.mean(axis=0) - 0.4) < 0.3)
  assert n_N[p_N == 0].sum() == 0
  assert B * p_N[p_N > 0].min() > 5, 'for chi-square'
  p = scipy.stats.chisquare(n_N[p_N > 0], B * p_N[p_N > 0]).pvalue
  assert p > 0.01


def test_a_mixture_of_one_distribution_replaces_by_it():
  p_NV = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
  p_NV = jax.nn.softmax(Mixture().replacement(p_NV, p_NV))
  np.testing.assert_allclose(p_NV, [[0.1, 0.2, 0.7]], rtol=1e-6)


@pytest.mark.parametrize(
  ('rule', 'more'),
  [
    (Rank(2), (2, 1)),
    pytest.param(Mixture(0.5), (3, 0), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_ids_that_pad_a_vocabulary_are_no_tokens(rule, more):
  """However many there are of each model, and however likely they are to it."""

  def readers(*more):
    return [
      Table(jnp.pad(z_VV, (0, n), constant_values=9.0))
      for z_VV, n in zip(tables(6), more, strict=True)
    ]

  valid = Sampler(valid_vocab=6)
  settings = drafting(rule, 3, 12, student=valid, teacher=valid)
  got, want = (
    write(readers(*more), np.arange(6), keys_of(6), settings)[:2]
    for more in (more, (0, 0))
  )
  assert 0.1 < want[1].mean() < 0.9
  jax.tree.map(np.testing.assert_array_equal, got, want)


# Models with caches.

V = 32
SHAPE = {
  'vocab_size': V,
  'width': 32,
  'layers': 2,
  'heads': 4,
  'kv_heads': 2,
  'head_dim': 8,
  'ff_width': 48,
  'tied_head': True,
  'rope_theta': 1e4,
  'norm_eps': 1e-6,
  'max_length': 26,  # prompt and response exactly
}
# Like Gemma 2 and Mistral, and like GPT-2: student and teacher.
PAIRS = {
  'windows': (
    {
      'windows': (4, 0),
      'attention_cap': 0.5,
      'head_cap': 4.0,
      'post_norms': True,
      'norm_from_one': True,
      'scaled_embedding': True,
      'qk_norm': False,
    },
    {'windows': (6,), 'layers': 1, 'width': 48, 'tied_head': False},
  ),
  'learned': (
    {'learned_positions': True, 'layer_norm': True, 'bias': True, 'layers': 1},
    {'learned_positions': True, 'layers': 1, 'width': 48},
  ),
}


def make_model(seed, **shape):
  config = transformer.DecoderConfig(**SHAPE | shape)
  model = transformer.Decoder(config, nnx.Rngs(seed))
  model.final_norm.scale[...] += 1  # Logits that spread over some nats.
  return model


LENGTHS = (5, 1, 12, 0, 7)
EOS = (5,)
N = 14  # new tokens


@functools.cache
def whole(kind):
  return [make_model(i, **shape) for i, shape in enumerate(PAIRS[kind])]


@functools.cache
def pair(kind='windows'):
  return [decoding.unstack(model) for model in whole(kind)]


_decode = jax.jit(speculative.decode_batch, static_argnames='settings')
_decode_alone = jax.jit(
  sampling.decode_batch,
  static_argnames=('sampler', 'max_new_tokens', 'eos_ids'),
)


def _prompts(T=12):
  rng = np.random.default_rng(0)
  prompt_BT = rng.integers(4, V, (len(LENGTHS), 12)).astype(np.int32)
  is_prompt_BT = np.arange(12) < np.array(LENGTHS)[:, None]
  prompt_BT = np.where(is_prompt_BT, prompt_BT, 9)
  keys_B = jax.random.split(jax.random.key(7), len(LENGTHS))
  return (
    np.pad(prompt_BT, ((0, 0), (0, T - 12)), constant_values=9),
    np.array(LENGTHS),
    keys_B,
  )


def _responses(ids_BS, end_B, lengths):
  ids_BS, end_B = jax.device_get((ids_BS, end_B))
  return [
    ids[n:end].tolist()
    for ids, n, end in zip(ids_BS, lengths, end_B, strict=True)
  ]


def texts(settings, models=None, rows=slice(None), T=12):
  prompt_BT, length_B, key_B = (x[rows] for x in _prompts(T))
  ids_BS, end_B, trace = _decode(
    models or pair(), prompt_BT, length_B, key_B, settings=settings
  )
  return _responses(ids_BS, end_B, length_B), jax.device_get(trace)


def texts_alone(model, sampler_):
  prompt_BT, length_B, key_B = _prompts()
  return _responses(
    *_decode_alone(
      model,
      prompt_BT,
      length_B,
      key_B,
      sampler=sampler_,
      max_new_tokens=N,
      eos_ids=EOS,
    ),
    length_B,
  )


SETTINGS = {
  gamma: drafting(
    Rank(4),
    gamma,
    N,
    EOS,
    student=Sampler(0.9, top_p=0.9),
    teacher=Sampler(0.8, top_p=0.95),
  )
  for gamma in (1, 2, 5, 8)
}


@pytest.mark.slow
@pytest.mark.parametrize('gamma', [1, 2, 8])
def test_a_text_does_not_depend_on_how_far_is_drafted(gamma):
  want, trace = texts(SETTINGS[5])
  assert texts(SETTINGS[gamma])[0] == want
  # Of several blocks, and by both models.
  assert np.median([len(x) for x in want]) > 8
  assert want[3] == []
  own, tokens = trace.by_teacher_BS.sum(), sum(map(len, want))
  assert 0.1 < own / tokens < 0.9
  assert trace.kept_BJ.sum() + own == tokens


@pytest.mark.slow
def test_a_teacher_that_accepts_all_leaves_the_student_alone():
  student = Sampler(0.9, top_p=0.9)
  got, trace = texts(drafting(Rank(V), 5, N, EOS, student=student))
  assert got == texts_alone(pair()[0], student)
  assert not trace.by_teacher_BS.any()


@pytest.mark.slow
def test_only_the_teachers_first_choice_is_greedy_decoding_by_the_teacher():
  got, trace = texts(drafting(Rank(1), 5, N, EOS, teacher=GREEDY))
  assert got == texts_alone(pair()[1], GREEDY)
  assert 0 < trace.kept_BJ.sum() < sum(map(len, got)), 'some are drafted'


@pytest.mark.slow
def test_a_row_is_the_same_alone_and_beside_longer_prompts():
  settings = SETTINGS[5]
  want, trace = texts(settings)
  (got,), alone = texts(settings, rows=slice(0, 1), T=20)
  assert got == want[0]
  assert len(got) > 5
  assert alone.blocks_B[0] == trace.blocks_B[0] > 1


@pytest.mark.parametrize('kind', PAIRS)
def test_a_text_is_that_of_whole_forward_passes(kind):
  """Token by token, without caches, blocks or drafts that are dropped.

  Windows, soft caps and learned positions hold beyond what is taken back.
  """
  settings = SETTINGS[5]
  responses, trace = texts(settings, pair(kind))
  prompt_BT, length_B, key_B = _prompts()
  full = jax.jit(lambda models, ids_1T: [m.logits(ids_1T)[0] for m in models])

  @jax.jit
  def next_token(z_TV, t, key, i):
    """Of Algorithm 1, with the numbers that are drawn for token i."""
    q_V, p_V = (z_TV_[t] for z_TV_ in z_TV)

    def draw(sampler_, z_V, key):
      z_1V = sampler_.filter(z_V[None])
      return sampler_.draw(z_1V, jax.random.fold_in(key, i)[None])[0]

    draft = draw(settings.student, q_V, key)
    own = draw(settings.teacher, p_V, jax.random.fold_in(key, keys.TEACHER))
    return jnp.where(jnp.sum(p_V > p_V[draft]) < 4, draft, own)

  for b, response in enumerate(responses):
    ids_1T = np.zeros((1, 26), np.int32)
    n = length_B[b]
    ids_1T[0, :n] = prompt_BT[b, :n]
    for i, token in enumerate(response):
      want = next_token(full(whole(kind), ids_1T), n + i - 1, key_B[b], i)
      assert token == want, (b, i)
      ids_1T[0, n + i] = token
    assert not response or len(response) == N or response[-1] in EOS
  assert 0 < trace.by_teacher_BS.sum() < sum(map(len, responses))
