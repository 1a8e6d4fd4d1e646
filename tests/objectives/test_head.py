"""The streamed head against full logits: values, gradients, memory, meshes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import sharding
from gakd_jax.data.pipeline import Tokens
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import divergences, head

B, T, D, V = 4, 12, 16, 50


def _tokens(seed=0, spans=((3, 12), (0, 0), (5, 9), (1, 9)), length=T):
  """Rows with responses at `spans`: whole, none, with padding, unprompted."""
  ids_BT = np.random.default_rng(seed).integers(0, V, (len(spans), length))
  at_BT = np.broadcast_to(np.arange(length), ids_BT.shape)
  start_B1, end_B1 = np.array(spans).T[:, :, None]
  return Tokens(
    ids_BT.astype(np.int32),
    (at_BT < end_B1).astype(np.int32),
    (at_BT >= start_B1) & (at_BT < end_B1),
  )


def _outputs(seed=1, shape=(B, T), vocabs=(V, V), widths=(D, 2 * D)):
  """Random hidden states and heads with logits of several nats."""
  rng = np.random.default_rng(seed)

  def normal(*sizes):
    return jnp.asarray(rng.standard_normal(sizes, np.float32))

  hiddens = [normal(*shape, d) for d in widths]
  heads = [
    normal(v, d) * 2 / d**0.5 for v, d in zip(vocabs, widths, strict=True)
  ]
  return hiddens, heads


def _token_loss(logits, targets_N):
  """CE, plus reverse KL if there is a teacher; as plain as can be."""
  log_q_NV = jax.nn.log_softmax(logits[0])
  ce_N = -jnp.take_along_axis(log_q_NV, targets_N[:, None], axis=1)[:, 0]
  if len(logits) == 1:
    return ce_N, {'ce': ce_N}
  log_p_NV = jax.nn.log_softmax(logits[1])
  kl_N = jnp.sum(jnp.exp(log_q_NV) * (log_q_NV - log_p_NV), axis=1)
  return ce_N + 2 * kl_N, {'ce': ce_N, 'kl': kl_N}


def _direct(hiddens, heads, tokens):
  """The same with the logits of every position and, for once, no chunks."""
  V = min(len(w) for w in heads)
  logits = [
    jnp.einsum('btd,vd->btv', h[:, :-1], w[:V], precision='highest')
    for h, w in zip(hiddens, heads, strict=True)
  ]
  loss_N, metrics = _token_loss(
    [z.reshape(-1, V) for z in logits], tokens.ids_BT[:, 1:].reshape(-1)
  )
  mask_N = tokens.mask_BT[:, 1:].reshape(-1)
  n = jnp.maximum(mask_N.sum(), 1)

  def mean(x_N):
    return jnp.sum(jnp.where(mask_N, x_N, 0)) / n

  return mean(loss_N), jax.tree.map(mean, metrics)


def _token_mean(token_loss, outputs, tokens, n, *, chunk):
  """As the objectives for one tokenizer call it."""
  targets_BT, mask_BT = head.next_token(tokens)
  outputs = head.shared(outputs)
  return head.weighted_sum(
    token_loss, outputs, targets_BT, mask_BT / n, chunk=chunk
  )


def _streamed(hiddens, heads, tokens, chunk=10, token_loss=_token_loss):
  outputs = tuple(
    Outputs(h, Head(w)) for h, w in zip(hiddens, heads, strict=True)
  )
  n = jnp.maximum(tokens.mask_BT.sum(), 1)
  return _token_mean(token_loss, outputs, tokens, n, chunk=chunk)


def _with_gradients(f):
  """Compiled (hiddens, heads, tokens) -> (loss, metrics), gradients."""
  return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))


# One compilation for all tests of the same shapes.
_direct_all = _with_gradients(_direct)


@functools.cache
def _streamed_all(chunk=10):
  return _with_gradients(functools.partial(_streamed, chunk=chunk))


def _assert_close(got, want, rtol=1e-5, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    got,
    want,
  )


def _shapes(text):
  """Sizes of all arrays in the text of a compiled function, in elements."""
  found = re.findall(r'\b(?:f32|bf16|f16|s32|u32|pred)\[([\d,]*)\]', text)
  return [tuple(int(n) for n in dims.split(',') if n) for dims in found]


# 21 response tokens: one by one, in equal parts, with a rest, all at once.
@pytest.mark.parametrize(
  ('chunk', 'models'), [(1, 2), (7, 1), (10, 1), (10, 2), (1000, 2)]
)
def test_streamed_equals_full_logits(chunk, models):
  tokens = _tokens()
  assert tokens.mask_BT.sum(axis=1).tolist() == [9, 0, 4, 8]
  hiddens, heads = (x[:models] for x in _outputs())
  got = _streamed_all(chunk)(hiddens, heads, tokens)
  want = _direct_all(hiddens, heads, tokens)
  _assert_close(got, want)
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(want[1]))


def test_a_soft_cap_bends_logits_before_the_loss():
  """Gemma 2's; the teacher has none, and gradients pass through it."""

  def streamed(hiddens, heads, tokens):
    capped = Outputs(hiddens[0], Head(heads[0], 2.0))
    outputs = capped, Outputs(hiddens[1], Head(heads[1]))
    return _token_mean(_token_loss, outputs, tokens, 21, chunk=10)

  def loss(logits, targets_N):
    return _token_loss([2 * jnp.tanh(logits[0] / 2), logits[1]], targets_N)

  tokens, arrays = _tokens(), _outputs()
  plain = functools.partial(_streamed, token_loss=loss)
  got, want = (_with_gradients(f)(*arrays, tokens) for f in (streamed, plain))
  _assert_close(got, want)
  assert abs(got[0][0] - _direct_all(*arrays, tokens)[0][0]) > 0.1


def test_without_jit_it_is_the_same():
  hiddens, heads = _outputs()
  got = _streamed(hiddens, heads, _tokens())
  _assert_close(got, _streamed_all()(hiddens, heads, _tokens())[0], atol=0)


def test_a_batch_without_responses_is_zero():
  tokens = _tokens()
  tokens = tokens.replace(mask_BT=np.zeros_like(tokens.mask_BT))
  for x in jax.tree.leaves(_streamed_all()(*_outputs(), tokens)):
    np.testing.assert_array_equal(x, 0)


def test_each_target_meets_the_position_before_it():
  """Hidden states say where they stand; the loss pairs that with its target."""
  at_BT = np.arange(B * T, dtype=np.float32).reshape(B, T)
  hidden_BTD = jnp.zeros((B, T, D)).at[:, :, 0].set(at_BT)
  head_VD = np.eye(V, D, dtype=np.float32)

  def pair(logits, targets_N):
    at_N = logits[0][:, 0]
    return at_N * targets_N, {'at': at_N, 'target': targets_N + 0.0}

  tokens = _tokens()
  loss, metrics = jax.jit(lambda *a: _streamed(*a, token_loss=pair, chunk=10))(
    [hidden_BTD], [head_VD], tokens
  )
  n, (b, t) = tokens.mask_BT.sum(), np.nonzero(tokens.mask_BT)
  at_n, target_n = at_BT[b, t - 1], tokens.ids_BT[b, t]
  np.testing.assert_allclose(loss, (at_n * target_n).sum() / n, rtol=1e-6)
  np.testing.assert_allclose(metrics['at'], at_n.sum() / n, rtol=1e-6)
  np.testing.assert_allclose(metrics['target'], target_n.sum() / n, rtol=1e-6)


def test_only_positions_before_a_response_token_get_a_gradient():
  tokens = _tokens()
  _, (d_hiddens, _) = _streamed_all()(*_outputs(), tokens)
  for d_BTD in d_hiddens:
    np.testing.assert_array_equal(
      np.any(d_BTD[:, :-1], axis=-1), tokens.mask_BT[:, 1:]
    )
    assert not np.any(d_BTD[:, -1])


def test_a_response_at_the_very_start_has_no_position_to_be_predicted_from():
  """A mask on token 0 is not the last position's, by way of `roll`."""
  hiddens, heads = _outputs()
  tokens = _tokens()
  mask_BT = tokens.mask_BT.copy()
  mask_BT[:, 0] = True
  changed = tokens.replace(mask_BT=mask_BT)
  f = _streamed_all()
  scale = mask_BT.sum() / tokens.mask_BT.sum()
  got, want = (f(hiddens, heads, x)[0][0] for x in (changed, tokens))
  np.testing.assert_allclose(got * scale, want, rtol=1e-6)


def test_prompt_and_padding_do_not_matter():
  tokens = _tokens()
  hiddens, heads = _outputs()
  used_BT = np.roll(tokens.mask_BT, -1, axis=1)
  others, _ = _outputs(seed=7)
  changed = [
    np.where(used_BT[:, :, None], h, 100 * o)
    for h, o in zip(hiddens, others, strict=True)
  ]
  ids_BT = np.where(tokens.mask_BT, tokens.ids_BT, V - 1 - tokens.ids_BT)
  f = _streamed_all()
  got = f(changed, heads, tokens.replace(ids_BT=ids_BT))
  _assert_close(got, f(hiddens, heads, tokens), atol=0)


def test_the_loss_divides_by_the_number_that_it_is_given():
  hiddens, heads = (x[:1] for x in _outputs())

  @jax.jit
  def mean(n):
    outputs = (Outputs(hiddens[0], Head(heads[0])),)
    return _token_mean(_token_loss, outputs, _tokens(), n, chunk=10)

  (one, one_metrics), (four, four_metrics) = mean(1), mean(4)
  np.testing.assert_allclose(one, 4 * four, rtol=1e-6)
  np.testing.assert_allclose(one_metrics['ce'], 4 * four_metrics['ce'])


@pytest.mark.parametrize('vocabs', [(50, 57), (57, 50)])
def test_rows_beyond_the_shared_vocabulary_are_left_out(vocabs):
  hiddens, heads = _outputs(vocabs=vocabs)
  f = _streamed_all()
  got = f(hiddens, heads, _tokens())
  shared = [w[:50] for w in heads]
  want = _direct_all(hiddens, shared, _tokens())
  d_hiddens, d_heads = got[1]
  _assert_close((got[0], (d_hiddens, [d[:50] for d in d_heads])), want)
  for d_VD, V in zip(d_heads, vocabs, strict=True):
    assert d_VD.shape[0] == V
    assert np.all(np.any(d_VD[:50], axis=1))
    np.testing.assert_array_equal(d_VD[50:], 0)
  huge = [w.at[50:].add(1e4) for w in heads]
  _assert_close(f(hiddens, huge, _tokens()), got, atol=0)


def test_bf16_inputs_lose_only_the_rounding_of_gradients():
  """Against fp32 on the same, rounded numbers.

  Logits, sums and so the loss are fp32 from there on. The gradient of the
  logits is rounded once, to bf16's 8 bits, and so are the results: 2^-8 each,
  relative to the largest term of a sum.
  """
  rounded = [x.astype(jnp.bfloat16) for x in jax.tree.leaves(_outputs())]
  inputs = rounded[:2], rounded[2:]
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
  f = _streamed_all()
  got, want = f(*inputs, _tokens()), f(*exact, _tokens())
  assert {x.dtype for x in jax.tree.leaves(got[0])} == {jnp.dtype('float32')}
  _assert_close(got[0], want[0])
  for g, w in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
    assert g.dtype == jnp.bfloat16
    w = np.asarray(w)
    np.testing.assert_allclose(g, w, rtol=0, atol=np.abs(w).max() / 2**7)
    assert np.any(g != w)


def test_sums_over_chunks_do_not_stall_in_bf16():
  """399 equal terms, one a chunk: a bf16 sum would stop at the 256th."""
  tokens = _tokens(spans=[(1, 400)], length=400)
  tokens = tokens.replace(ids_BT=np.full_like(tokens.ids_BT, 7))
  hidden_D, head_VD = jnp.arange(1, 5) / 4, jnp.zeros((V, 4))
  hidden_BTD = jnp.broadcast_to(hidden_D, (1, 400, 4))
  inputs = [[x.astype(jnp.bfloat16)] for x in (hidden_BTD, head_VD)]
  (loss, _), (_, (d_VD,)) = _streamed_all(1)(*inputs, tokens)
  np.testing.assert_allclose(loss, np.log(V), rtol=1e-5)
  want_V1 = 1 / V - np.eye(V)[7][:, None]
  np.testing.assert_allclose(
    d_VD.astype(jnp.float32), want_V1 * hidden_D[None], rtol=0.01
  )


def test_a_factor_outside_of_the_loss_is_not_rounded_before_it_is_used():
  """1/3 in bf16 is 0.2 % too large; the gradient is rounded once, either way."""
  hidden_BTD, head_VD = (x[0].astype(jnp.bfloat16) for x in _outputs())

  def total(hidden_BTD, factor):
    return factor * _streamed([hidden_BTD], [head_VD], _tokens())[0]

  third, whole = (
    np.asarray(jax.grad(total)(hidden_BTD, factor), np.float64)
    for factor in (1 / 3, 1.0)
  )
  scale = np.sum(third * whole) / np.sum(whole * whole)
  assert abs(3 * scale - 1) < 5e-4


def test_positions_that_the_caller_chooses():
  """Each token of an answer at the position of another one."""
  hiddens, heads = _outputs()
  rng = np.random.default_rng(3)
  index_BM, targets_BM = rng.integers(0, T, (B, 5)), rng.integers(0, V, (B, 5))
  weights_BM = rng.random((B, 5)).astype(np.float32)
  weights_BM[1:3, 2:] = 0

  def loss(logits, targets):
    ids_N, scale_N = targets
    value_N, metrics = _token_loss(logits, ids_N)
    return scale_N * value_N, metrics

  def streamed(hidden_BTD):
    outputs = head.at(Outputs(hidden_BTD, Head(heads[0])), index_BM)
    targets = targets_BM, jnp.asarray(2 * weights_BM)
    value, _ = head.weighted_sum(loss, (outputs,), targets, weights_BM, chunk=4)
    return value

  def direct(hidden_BTD):
    hidden_BMD = hidden_BTD[np.arange(B)[:, None], index_BM]
    log_q_BMV = jax.nn.log_softmax(hidden_BMD @ heads[0].T)
    rows, columns = np.indices((B, 5))
    ce_BM = -log_q_BMV[rows, columns, targets_BM]
    return jnp.sum(2 * weights_BM**2 * ce_BM)

  got, want = (jax.value_and_grad(f)(hiddens[0]) for f in (streamed, direct))
  _assert_close(got, want, atol=1e-5)


@pytest.mark.parametrize('chunk', [4, 1000])
def test_sums_over_the_tokens_of_each_row(chunk):
  hiddens, heads = _outputs()
  mask_BT = _tokens().mask_BT
  got_BV = head.row_sums(
    jax.nn.softmax, Outputs(hiddens[0], Head(heads[0])), mask_BT, chunk=chunk
  )
  q_BTV = jax.nn.softmax(hiddens[0] @ heads[0].T)
  want_BV = np.sum(q_BTV, axis=1, where=mask_BT[:, :, None])
  np.testing.assert_allclose(got_BV, want_BV, rtol=1e-5, atol=1e-6)


@functools.cache
def _compiled_map(rows, dtype='float32', argnums=(0, 1, 2), V=1000, C=4):
  """The gradients of features of all logits, for shapes alone."""

  def loss(hidden_BTD, head_VD, w_VC, mask_BT):
    outputs = Outputs(hidden_BTD, Head(head_VD))
    x_BTC = head.token_map(
      lambda z_NV, _, w_VC: jax.nn.softmax(z_NV) @ w_VC,
      outputs,
      (),
      w_VC,
      mask_BT,
      chunk=64,
    )
    return jnp.sum(jnp.sin(x_BTC))

  shape = jax.ShapeDtypeStruct
  return jax.jit(jax.grad(loss, argnums)).trace(
    shape((rows, 256, D), dtype),
    shape((V, D), dtype),
    shape((V, C), 'float32'),
    shape((rows, 256), 'bool'),
  )


def test_gradients_of_features_take_one_chunk_and_one_head():
  """Whatever the number of chunks, and in fp32 only as a sum."""
  small, large = (
    _compiled_map(rows).lower().compile().memory_analysis() for rows in (2, 16)
  )
  more = large.temp_size_in_bytes - small.temp_size_in_bytes
  # Features and their gradient, and what `_loop` knows of a token.
  assert more <= (16 - 2) * 256 * (4 * 4 * 4 + 32)
  wide = f'f32[1000,{D}]'
  assert wide in str(_compiled_map(2, 'bfloat16').jaxpr)
  frozen = _compiled_map(2, 'bfloat16', argnums=(0, 2))
  assert wide not in str(frozen.jaxpr)


def test_tied_weights_get_the_sum_of_both_gradients():
  """As the embedding and as the head: weights that occur twice."""
  tokens = _tokens()
  weight_VD = _outputs(widths=(D, D))[1][0]

  def loss(f, weight_VD):
    hidden_BTD = jnp.tanh(weight_VD[tokens.ids_BT])
    return f([hidden_BTD], [weight_VD], tokens)[0]

  got, want = (
    jax.jit(jax.grad(functools.partial(loss, f)))(weight_VD)
    for f in (_streamed, _direct)
  )
  _assert_close(got, want)


def _loops(jaxpr):
  """All while loops of a jaxpr, inner ones included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'while':
      yield eqn
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _loops(inner)


@pytest.mark.parametrize(
  ('wanted', 'products', 'sums'),
  [
    ('', 2, 0),
    ('student hidden', 3, 0),
    ('student hidden, student head', 4, 1),
    ('student hidden, student head, teacher hidden, teacher head', 6, 2),
  ],
)
def test_what_is_not_differentiated_costs_nothing(wanted, products, sums):
  """Matrix products of V x D, and sums of that size that the loop carries.

  Two products are the logits. A frozen head (of the teacher; of a student
  with adapters) has no product and no sum, an evaluation no gradient at all.
  """
  names = 'student hidden', 'student head', 'teacher hidden', 'teacher head'

  def loss(*arrays):
    return _streamed(arrays[::2], arrays[1::2], _tokens())[0]

  argnums = tuple(i for i, name in enumerate(names) if name in wanted)
  f = jax.grad(loss, argnums) if argnums else loss
  hiddens, heads = _outputs(widths=(D, D))
  arrays = hiddens[0], heads[0], hiddens[1], heads[1]
  (loop,) = _loops(jax.make_jaxpr(f)(*arrays).jaxpr)
  body = loop.params['body_jaxpr'].jaxpr
  assert str(body).count('dot_general') == products
  carried = [x.aval.shape for x in loop.outvars]
  assert carried.count((V, D)) == sums
  hidden_shapes = [s for s in carried if s == (1, B * T, D)]
  assert len(hidden_shapes) == wanted.count('hidden')


@functools.cache
def _compiled(rows, length, chunk=64, V=1000):
  """The student's loss and gradients, compiled for shapes alone."""

  def shape(*sizes, dtype='float32'):
    return jax.ShapeDtypeStruct(sizes, dtype)

  ids_BT = shape(rows, length, dtype='int32')
  tokens = Tokens(ids_BT, ids_BT, shape(rows, length, dtype='bool'))
  hidden_BTD, head_VD = shape(rows, length, D), shape(V, D)

  def loss(s_hidden, s_head, t_hidden, t_head, tokens):
    return _streamed([s_hidden, t_hidden], [s_head, t_head], tokens, chunk)

  f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  args = hidden_BTD, head_VD, hidden_BTD, head_VD, tokens
  return f.lower(*args).compile()


@pytest.mark.parametrize(('rows', 'length'), [(2, 2048), (16, 256)])
def test_memory_is_that_of_one_chunk(rows, length):
  """12 bytes are found for each further token, its index and weight, where
  its logits would be 8000; hidden states and their gradient are not counted.
  """
  small, large = _compiled(2, 256), _compiled(rows, length)
  temp = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
  assert temp[1] - temp[0] <= 32 * (rows * length - 2 * 256)
  # The largest array is a chunk's logits, or the hidden states.
  size = max(map(math.prod, _shapes(large.as_text())))
  assert size <= max(64 * 1000, rows * length * D)


_COLLECTIVE = re.compile(
  r'= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all'
  r'|collective-permute|collective-broadcast)(?:-start)?\((.*)'
)


def _collectives(text):
  """(shapes, in the chunk loop?) of each collective in compiled HLO."""
  found = []
  for line in text.splitlines():
    if match := _COLLECTIVE.search(line):
      found.append((_shapes(match[1]), '/while/body/' in line))
  return found


def _id_loss(log_probs, targets_N, first):
  """`_token_loss` of two models, as a sum over ids."""
  log_q_NV, log_p_NV = log_probs
  ce_N = divergences.cross_entropy(log_q_NV, targets_N - first)
  kl_N = divergences.reverse_kl(log_p_NV, log_q_NV)
  return ce_N + 2 * kl_N, {'ce': ce_N, 'kl': kl_N}


def _summed(hiddens, heads, tokens, chunk):
  """`_streamed` by `head.sum_over_ids`."""
  targets_BT, mask_BT = head.next_token(tokens)
  outputs = tuple(map(Outputs, hiddens, map(Head, heads)))
  n = jnp.maximum(tokens.mask_BT.sum(), 1)
  return head.sum_over_ids(
    _id_loss, outputs, targets_BT, mask_BT / n, chunk=chunk
  )


@pytest.mark.parametrize('function', [_streamed, _summed])
def test_a_mesh_gives_the_same_and_moves_no_logits(function):
  """data 2 x fsdp 2 x tensor 2.

  The rows of the four batch groups have 20, 17, 8 and 0 response tokens: their
  loops end after 2, 2, 1 and 0 chunks.
  """
  B, D, V, chunk = 8, 8, 64, 16
  spans = [(2, 12), (1, 11), (3, 12), (4, 12), (5, 9), (7, 11), (0, 0), (0, 0)]
  tokens = _tokens(spans=spans)
  hiddens, heads = _outputs(shape=(B, T), vocabs=(V, V), widths=(D, D))
  want = _direct_all(hiddens, heads, tokens)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
  table = NamedSharding(mesh, P('tensor', 'fsdp'))
  put = jax.device_put
  with jax.set_mesh(mesh):
    f = _with_gradients(functools.partial(function, chunk=chunk))
    args = put(hiddens, rows), put(heads, table), put(tokens, rows)
    compiled = f.lower(*args).compile()
  got = compiled(*args)
  _assert_close(got, want, rtol=1e-5, atol=1e-5)

  found = _collectives(compiled.as_text())
  inside = [s for shapes, in_loop in found if in_loop for s in shapes]
  outside = [s for shapes, in_loop in found if not in_loop for s in shapes]
  # Inside the loop, over `tensor`: numbers per token (maximum and sum of the
  # softmax, the terms of the losses). Never anything with a V or a D.
  assert set(map(math.prod, inside)) == {chunk}
  # Outside, over the batch axes: each head is gathered once, its gradient and
  # the totals are summed once. Each device keeps its half of the vocabulary.
  # Over `tensor`: the gradient of each model's hidden states is summed once.
  half, local = (V // 2, D), (B // 4 * T, D)
  assert outside.count(half) == 4
  assert outside.count(local) == 2
  assert all(s in {half, local} or math.prod(s) <= 1 for s in outside)


@pytest.mark.parametrize('chunk', [5, 64])
def test_log_probabilities_of_each_token(chunk):
  tokens = _tokens()
  (hidden_BTD, _), (head_VD, _) = _outputs()
  outputs = Outputs(hidden_BTD, Head(head_VD, cap=3.0))
  found_BT = head.log_probs(outputs, *head.next_token(tokens), chunk=chunk)
  z_BTV = 3 * np.tanh(np.asarray(hidden_BTD) @ np.asarray(head_VD).T / 3)
  log_q_BTV = z_BTV - np.log(np.sum(np.exp(z_BTV), -1, keepdims=True))
  expected_BT = np.zeros((B, T))
  for b, t in np.argwhere(tokens.mask_BT):
    if t:  # The first token has nothing before it.
      expected_BT[b, t - 1] = log_q_BTV[b, t - 1, tokens.ids_BT[b, t]]
  np.testing.assert_allclose(found_BT, expected_BT, rtol=1e-5, atol=1e-5)

  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
  with jax.set_mesh(mesh):
    on_mesh_BT = jax.jit(
      lambda outputs, tokens: head.log_probs(
        outputs, *head.next_token(tokens), chunk=chunk
      )
    )(
      Outputs(
        jax.device_put(hidden_BTD, rows),
        Head(
          jax.device_put(head_VD, NamedSharding(mesh, P('tensor', 'fsdp'))), 3.0
        ),
      ),
      jax.device_put(tokens, rows),
    )
  np.testing.assert_allclose(on_mesh_BT, found_BT, rtol=1e-5, atol=1e-5)


def test_a_metric_may_have_a_column_for_each_kind_of_token():
  tokens = _tokens()
  hiddens, heads = _outputs()

  def by_parity(logits, targets_N):
    loss_N, metrics = _token_loss(logits, targets_N)
    return loss_N, metrics | {'n': jax.nn.one_hot(targets_N % 2, 2)}

  loss, metrics = _streamed(hiddens, heads, tokens, token_loss=by_parity)
  expected, _ = _streamed(hiddens, heads, tokens)
  assert loss == expected
  mask = np.array(tokens.mask_BT)
  mask[:, 0] = False
  odd = np.mean(tokens.ids_BT[mask] % 2)
  np.testing.assert_allclose(metrics['n'], [1 - odd, odd], rtol=1e-6)


@pytest.mark.parametrize('cap', [None, 3.0])
def test_the_largest_logits_and_their_gradient_are_those_of_all(cap):
  (hidden_BTD, _), (head_VD, _) = _outputs()
  mask_BT = jnp.asarray(_tokens().mask_BT)
  weights_BTK = jnp.arange(1.0, 1 + B * T * 4).reshape(B, T, 4) / T

  def total(of, hidden_BTD, head_VD):
    values_BTK = of(hidden_BTD, head_VD)
    return jnp.sum(jnp.sin(values_BTK) * weights_BTK), values_BTK

  def streamed(hidden_BTD, head_VD):
    outputs = Outputs(hidden_BTD, Head(head_VD, cap=cap))
    return head.largest(outputs, 4, mask_BT, chunk=5)

  def direct(hidden_BTD, head_VD):
    z_BTV = jnp.einsum('btd,vd->btv', hidden_BTD, head_VD, precision='highest')
    z_BTV = cap * jnp.tanh(z_BTV / cap) if cap else z_BTV
    return jax.lax.top_k(z_BTV, 4)[0] * mask_BT[:, :, None]

  (got, values), got_d = jax.value_and_grad(
    functools.partial(total, streamed), (0, 1), has_aux=True
  )(hidden_BTD, head_VD)
  (want, expected), want_d = jax.value_and_grad(
    functools.partial(total, direct), (0, 1), has_aux=True
  )(hidden_BTD, head_VD)
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(got_d, want_d, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
