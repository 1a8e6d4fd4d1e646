"""Attention: every backend is told the same; who may be asked for which."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import UserError, models
from gakd_jax.data.pipeline import Tokens
from gakd_jax.models import attention, critic, scores, splash, transformer

B, T, V = 4, 12, 40
CONFIG = models.DecoderConfig(
  vocab_size=V,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  ff_width=24,
  tied_head=True,
  rope_theta=1e4,
  norm_eps=1e-6,
  max_length=T,
)


def _heads(size):
  return dataclasses.replace(CONFIG, head_dim=size)


def _tokens(length=T, packed=False):
  """Rows of one document that fills them, of shorter ones, and of none."""
  rng = np.random.default_rng(0)
  ids_BT = rng.integers(0, V, (B, length), np.int32)
  lengths_B1 = np.array([[length], [7], [1], [0]])
  segments_BT = (np.arange(length) < lengths_B1).astype(np.int32)
  if packed:
    segments_BT[0, 5:] = 2
  return Tokens(ids_BT, segments_BT, segments_BT > 0)


def _run(config, tokens, dtype='float32', **settings):
  """Hidden states of tokens, and the gradient of a scalar of them."""
  model = models.Decoder(config, nnx.Rngs(0))
  definition, params = transformer.split(model)
  # Larger than fresh ones: attention looks at some keys more than at others.
  params = jax.tree.map(lambda x: 2 * x, params)

  @jax.jit
  def run(params):
    def loss(params):
      hidden_BTD = transformer.apply(
        definition, params, tokens, dtype, **settings
      ).astype(jnp.float32)
      hidden_BTD = jnp.where(tokens.mask_BT[..., None], hidden_BTD, 0)
      return jnp.sum(jnp.sin(hidden_BTD)), hidden_BTD

    return jax.grad(loss, has_aux=True)(params)

  return run(params)


@pytest.fixture
def asked(monkeypatch):
  """What `dot_product_attention` is asked for; XLA computes it, always."""
  found = []
  real = jax.nn.dot_product_attention

  def fake(*args, implementation, **kwargs):
    found.append(kwargs | {'implementation': implementation})
    return real(*args, implementation='xla', **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', fake)
  return found


def _assert_close(got, want, share):
  """Up to a share of the largest entry of each array."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=share * np.abs(b).max()
    ),
    got,
    want,
  )


# Layers' windows, and the one that all share; where they differ, a mask says.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('windows', 'shared'),
  [((), None), ((3, 3), (2, 0)), ((T, 0), None), ((3, 0), 'mask')],
  ids=str,
)
@pytest.mark.parametrize('packed', [False, True])
def test_cudnn_is_told_what_the_mask_says(windows, shared, packed, asked):
  config = dataclasses.replace(CONFIG, windows=windows)
  tokens = _tokens(packed=packed)
  want = _run(config, tokens)
  assert not asked
  got = _run(config, tokens, backend='cudnn', packed=packed)
  as_cudnn = asked[-1]
  assert as_cudnn['implementation'] == 'cudnn'
  if packed or shared == 'mask':
    assert 'query_seq_lengths' not in as_cudnn
    assert as_cudnn['mask'].shape == (B, 1, T, T)
  else:
    assert 'mask' not in as_cudnn
    assert as_cudnn['local_window_size'] == shared
  assert all(jnp.any(g != 0) for g in jax.tree.leaves(want))
  # Rounding: products of another order, through two layers and back.
  _assert_close(got, want, 5e-6)


@pytest.mark.slow
def test_windows_hide_something():
  """Else the test above would compare what is the same anyway."""
  plain, narrow, mixed = (
    _run(dataclasses.replace(CONFIG, windows=windows), _tokens())[1]
    for windows in ((), (3, 3), (3, 0))
  )
  assert np.abs(plain - narrow).max() > 0.1 < np.abs(mixed - narrow).max()


def test_groups_are_loops_and_read_the_same(monkeypatch):
  monkeypatch.setattr(scores, 'BLOCK', 8)
  key = jax.random.key(0)
  q, k, v = (
    jax.random.normal(k, (B, 64, 2, 8)) for k in jax.random.split(key, 3)
  )
  segments_BT = jnp.ones((B, 64), jnp.int32)
  want = scores.whole(q, k, v, segments_BT, None, 0.3)
  for groups in (1, 4):
    attend = functools.partial(
      scores.chunked, window=None, scale=0.3, groups=groups
    )
    got, program = jax.jit(attend)(q, k, v, segments_BT), jax.make_jaxpr(attend)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert str(program(q, k, v, segments_BT)).count('scan[') == groups


def test_a_small_critic_has_one_loop_of_attention(monkeypatch):
  """Its gradients of gradients would have many times as many."""
  monkeypatch.setattr(scores, 'BLOCK', 8)
  config = critic.config_of({'width': 8, 'heads': 2, 'ff_width': 8}, V)
  model = critic.Critic(config, nnx.Rngs(0))
  x_BTC, segments_BT = jnp.ones((B, 64, 8)), jnp.ones((B, 64), jnp.int32)
  for remat, groups in (('none', 1), ('blocks', 4)):
    program = jax.make_jaxpr(functools.partial(model, remat=remat))
    text = str(program(x_BTC, segments_BT))
    assert text.count('scan[') == 1 + groups  # and that over layers


@pytest.mark.slow
def test_cudnn_gets_no_mask_that_is_long_or_odd(asked, monkeypatch):
  _run(CONFIG, _tokens(9), backend='cudnn')
  monkeypatch.setattr(attention, 'LONGEST_MASK', T - 1)
  _run(CONFIG, _tokens(), backend='cudnn')
  assert not asked
  for length in (9, T):
    _run(CONFIG, _tokens(length), backend='cudnn', packed=False)
    assert asked[-1]['implementation'] == 'cudnn'


@pytest.mark.slow
def test_splash_is_asked_for_windows_that_all_layers_share(monkeypatch):
  found = []

  def fake(*args):
    found.append(args[4])
    return scores.whole(*args)

  monkeypatch.setattr(splash, 'attention', fake)
  for windows, asked in (((), [None]), ((3, 3), [3]), ((3, 0), [])):
    found.clear()
    config = dataclasses.replace(CONFIG, windows=windows, attention_cap=2.0)
    tokens = _tokens(packed=True)
    got = _run(config, tokens, backend='splash')
    assert found[:1] == asked
    _assert_close(got, _run(config, tokens), 1e-6)


CAN = CONFIG, 'bfloat16'
CAPPED = dataclasses.replace(CONFIG, family='gemma2', attention_cap=50.0)


@pytest.mark.parametrize(
  ('backend', 'platform', 'obstacle', 'word'),
  [
    ('cudnn', 'gpu', (*CAN, 'cpu'), "this is 'cpu'"),
    ('cudnn', 'gpu', (CONFIG, 'float32', 'gpu'), 'not float32'),
    ('cudnn', 'gpu', (_heads(12), 'bfloat16', 'gpu'), 'head_dim=12'),
    ('cudnn', 'gpu', (_heads(256), 'bfloat16', 'gpu'), 'head_dim=256'),
    ('cudnn', 'gpu', (CAPPED, 'bfloat16', 'gpu'), 'gemma2 caps its scores'),
    ('splash', 'tpu', (*CAN, 'cpu'), "this is 'cpu'"),
  ],
)
def test_auto_takes_the_kernel_that_can_be_had(
  backend, platform, obstacle, word
):
  for name, want in (('auto', backend), (backend, backend), ('xla', 'xla')):
    assert attention.choose_backend(name, *CAN, platform) == want
  assert attention.choose_backend('auto', *obstacle) == 'chunked'
  for name in ('chunked', 'xla'):
    assert attention.choose_backend(name, *obstacle) == name
  with pytest.raises(
    UserError, match=f"'{backend}': .*{word}.*; take 'chunked'"
  ):
    attention.choose_backend(backend, *obstacle)


def test_an_unknown_backend_is_one_line():
  with pytest.raises(UserError, match=r"'flash' is not known; .* xla, cudnn"):
    attention.choose_backend('flash', *CAN, 'gpu')


@pytest.mark.skipif(
  jax.default_backend() != 'gpu', reason='cuDNN needs CUDA (JAX_PLATFORMS=cuda)'
)
@pytest.mark.parametrize('windows', [(), (3, 3), (3, 0)], ids=str)
@pytest.mark.parametrize('packed', [False, True])
def test_cudnn_computes_what_xla_does(windows, packed):
  config = dataclasses.replace(CONFIG, windows=windows)
  args = config, _tokens(packed=packed), 'bfloat16'
  got, want = (
    _run(*args, backend=backend, packed=packed) for backend in ('cudnn', 'xla')
  )
  _assert_close(got, want, 0.02)  # bf16 has 8 bits.
