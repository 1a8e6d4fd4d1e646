"""Quantized projections: their numbers, their bytes, what models make of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError, models, plan, sharding
from gakd_jax.models import convert, decoding, lora, quantized
from gakd_jax.models.transformer import cast, split
from tools import make_goldens

L, I, O = 3, 128, 24
# Appendix E of arXiv 2305.14314.
LEVELS = np.array(
  [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
  ],
  np.float32,
)
IDS_BT = make_goldens.IDS_BT
SOME = lora.LoRAConfig(rank=3, alpha=12.0, targets='(query|value|down)$')


def _kernel(n_in=I):
  # Columns of different size: scales are each column's own.
  x_LIO = np.random.default_rng(0).standard_normal((L, n_in, O), np.float32)
  return x_LIO * np.geomspace(0.01, 10, O, dtype=np.float32)


def _rounded(x_LIO, kind):
  """Kernels as quantized and back, in numpy."""
  if kind == 'int8':
    step_L1O = np.abs(x_LIO).max(1, keepdims=True) / 127.5
    return np.clip(np.round(x_LIO / step_L1O), -128, 127) * step_L1O
  block = math.gcd(64, x_LIO.shape[1])
  blocks_LBIO = x_LIO.reshape(len(x_LIO), -1, block, x_LIO.shape[2])
  most_LB1O = np.abs(blocks_LBIO).max(2, keepdims=True)
  distance = (blocks_LBIO / most_LB1O)[..., None] - LEVELS
  nearest_LBIO = np.abs(distance).argmin(-1)
  return (LEVELS[nearest_LBIO] * most_LB1O).reshape(x_LIO.shape)


def _widened(kernel_LIO, scale_LBO):
  eye = jnp.eye(kernel_LIO.shape[1], dtype=scale_LBO.dtype)
  return np.stack(
    [quantized.matmul(eye, *x) for x in zip(kernel_LIO, scale_LBO, strict=True)]
  )


def test_int8_is_rounding_to_an_output_s_largest_weight():
  x_LIO = _kernel()
  kernel, scale = quantized.quantize(x_LIO, 'int8')
  assert kernel.dtype == jnp.int8
  most_L1O = np.abs(x_LIO).max(1, keepdims=True)
  step_L1O = most_L1O / 127.5
  np.testing.assert_allclose(scale, step_L1O, rtol=1e-6)
  got_LIO = _widened(kernel, scale)
  np.testing.assert_allclose(got_LIO, kernel * scale, rtol=1e-6)
  assert np.all(np.abs(got_LIO - x_LIO) <= 0.501 * step_L1O)
  # The largest lies between two integers, and may go to either.
  got_LIO, want_LIO = (
    np.where(np.abs(x_LIO) == most_L1O, 0, x)
    for x in (got_LIO, _rounded(x_LIO, 'int8'))
  )
  np.testing.assert_allclose(got_LIO, want_LIO, rtol=1e-5)


@pytest.mark.parametrize(('n_in', 'block'), [(128, 64), (64, 64), (48, 16)])
def test_nf4_is_the_nearest_of_16_levels_in_blocks(n_in, block):
  x_LIO = _kernel(n_in)
  kernel, scale = quantized.quantize(x_LIO, 'nf4')
  assert kernel.dtype == jnp.uint4
  assert kernel.shape == x_LIO.shape
  most_LBO = np.abs(x_LIO.reshape(L, -1, block, O)).max(2)
  np.testing.assert_array_equal(scale, most_LBO)
  got_LIO = _widened(kernel, scale)
  np.testing.assert_allclose(got_LIO, _rounded(x_LIO, 'nf4'), rtol=1e-6)
  # Half of the widest gap between two levels.
  error_LIO = np.abs(got_LIO - x_LIO) / most_LBO.repeat(block, 1)
  assert error_LIO.max() <= (1 - 0.6961928) / 2 + 1e-6


@pytest.mark.parametrize(('kind', 'most'), [('int8', 0.02), ('nf4', 0.15)])
def test_bf16_scales_add_little(kind, most):
  x_LIO = _kernel()
  kernel, scale = quantized.quantize(x_LIO.astype(jnp.bfloat16), kind)
  assert scale.dtype == jnp.bfloat16
  got_LIO = _widened(kernel, scale).astype(np.float32)
  off, size = (np.linalg.norm(x, axis=1) for x in (got_LIO - x_LIO, x_LIO))
  assert np.max(off / size) < most


def test_the_gradient_passes_through_and_no_wide_kernel_is_kept():
  """In a scan without remat, whose residuals are stacked."""
  kernel, scale = quantized.quantize(_kernel(O), 'nf4')
  x = np.random.default_rng(1).standard_normal((5, O), np.float32)

  def run(multiply):
    def total(x):
      def body(x, w):
        return jnp.tanh(multiply(x, *w)), None

      return jnp.sum(jax.lax.scan(body, x, (kernel, scale))[0] ** 2)

    return jax.jit(jax.grad(total)).lower(x).compile()

  def kept(x, kernel_IO, scale_BO):
    return x @ quantized.matmul(jnp.eye(O), kernel_IO, scale_BO)

  ours, wide = run(quantized.matmul), run(kept)
  np.testing.assert_allclose(ours(x), wide(x), rtol=1e-5, atol=1e-5)
  stack = f'f32[{L},{O},{O}]'
  assert stack in wide.as_text()
  assert stack not in ours.as_text()


def _logits(model):
  definition, params = split(model)
  return jax.jit(lambda p: nnx.merge(definition, p).logits(IDS_BT))(params)


@pytest.mark.slow
@pytest.mark.parametrize(
  'case',
  [
    pytest.param(case, marks=[pytest.mark.slow] * (case != 'gpt2'))
    for case in sorted(make_goldens.CASES)
  ],
)
def test_every_family_loads_and_computes_with_rounded_kernels(case, tmp_path):
  path = make_goldens.write_directory(make_goldens.CASES[case], tmp_path / 'm')
  plain = models.load(path)
  definition, params = split(plain)
  flat = convert.flatten(params)
  run = jax.jit(lambda p: nnx.merge(definition, p).logits(IDS_BT))
  unrounded = run(params)
  # Random weights have nothing to spare: nf4's error is that of the kernels,
  # 0.1 of their size, in three layers.
  for kind, most in (('int8', 0.03), ('nf4', 0.4)):
    model = models.load(path, quantize=kind)
    got = _logits(model)
    here = convert.flatten(split(model)[1])
    rounded = dict(flat)
    for name, scale in here.items():
      if name.endswith('_scale'):
        name = name.removesuffix('_scale')
        kernel = np.asarray(here[name]).astype(int)
        values = LEVELS[kernel] if kind == 'nf4' else kernel
        block = kernel.shape[1] // scale.shape[1]
        rounded[name] = values * np.repeat(scale, block, 1)
    want = run(convert.unflatten(rounded))
    np.testing.assert_allclose(got, want, atol=1e-4)
    off = np.linalg.norm(got - unrounded) / np.linalg.norm(unrounded)
    assert 1e-4 < off < most
    assert model.config == plain.config
    for name, x in flat.items():
      assert here[name].shape == x.shape
      if not name.endswith('kernel'):
        np.testing.assert_array_equal(here.pop(name), x)
    kernels = [name for name in flat if name.endswith('kernel')]
    scales = [f'{name}_scale' for name in kernels]
    assert sorted(here) == sorted([*kernels, *scales])


def test_each_kernel_is_gone_before_the_next_is_read(
  tiny_model_dir, monkeypatch
):
  source = tiny_model_dir()
  read, wide = convert._reader, []

  def reader(files, shape, *args):
    here = [x for x in jax.live_arrays() if x.dtype == jnp.float16]
    wide.append(sum(x.ndim == 3 and x.shape[1] > 1 for x in here))
    return read(files, shape, *args)

  monkeypatch.setattr(convert, '_reader', reader)
  models.load(source, dtype='float16', quantize='int8')
  assert wide == [0] * (1 + 7 + 5)  # embedding, projections, norms


@pytest.mark.parametrize(('kind', 'share'), [('int8', 0.55), ('nf4', 0.32)])
def test_bytes_of_the_projections(kind, share, tiny_model_dir):
  source = tiny_model_dir(width=64, ff_width=128, dtype='bfloat16')
  mesh = sharding.make_mesh(data=1)

  def size(quantize):
    model = models.load(source, mesh=mesh, quantize=quantize)
    flat = convert.flatten(split(model)[1])
    here = {k: x for k, x in flat.items() if 'kernel' in k}
    own = jax.jit(lambda x: x).lower(here).compile().memory_analysis()
    assert plan.device_bytes(here) == own.argument_size_in_bytes
    return plan.device_bytes(here)

  assert size(kind) <= share * size(None)


@pytest.mark.slow
@pytest.mark.parametrize('kind', quantized.KINDS)
def test_eight_devices_are_one(kind, tiny_model_dir):
  source = tiny_model_dir(width=256, ff_width=128)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  model = models.load(source, mesh=mesh, quantize=kind)
  whole = models.load(source, quantize=kind)
  definition, params = split(model)
  assert definition == split(whole)[0]
  jax.tree.map(np.testing.assert_array_equal, params, split(whole)[1])
  flat = convert.flatten(params)
  for name in ('kernel', 'kernel_scale'):
    blocks = name == 'kernel' or kind == 'nf4'
    split_in = 'fsdp' if blocks else None
    spec = flat[f'blocks/attention/query/{name}'].sharding.spec
    assert spec == P(None, split_in, 'tensor')
    split_in = 'tensor' if blocks else None
    spec = flat[f'blocks/mlp/down/{name}'].sharding.spec
    assert spec == P(None, split_in, 'fsdp')
  ids_BT = np.random.default_rng(0).integers(0, 300, (4, 8), np.int32)
  logits = jax.jit(lambda p, ids: nnx.merge(definition, p).logits(ids))
  np.testing.assert_allclose(
    logits(params, sharding.put_batch(ids_BT, mesh)),
    logits(split(whole)[1], ids_BT),
    atol=1e-5,
  )


@pytest.mark.parametrize('kind', quantized.KINDS)
def test_no_kernel_is_gathered_over_the_axis_that_splits_its_outputs(kind):
  mesh = sharding.make_mesh(data=4, tensor=2)
  kernel, scale = quantized.quantize(_kernel(), kind)
  name = 'mlp/up/kernel'
  places = sharding.shardings(
    {name: kernel[0], f'{name}_scale': scale[0]}, mesh
  )
  w = jax.device_put((kernel[0], scale[0]), tuple(places.values()))
  x = sharding.put_batch(np.ones((8, I), np.float32), mesh)
  text = jax.jit(quantized.matmul).lower(x, *w).compile().as_text()
  assert f'f32[2,{O // 2}]' in text  # of each device, rows and outputs
  assert 'all-gather' not in text


def test_cached_decoding_equals_the_full_forward(tiny_model_dir):
  model = models.load(tiny_model_dir(), quantize='nf4')
  definition, params = split(model)
  positions_BT = np.broadcast_to(np.arange(IDS_BT.shape[1]), IDS_BT.shape)

  @jax.jit
  def decode(params):
    model = nnx.merge(definition, params)
    cache = model.init_cache(*IDS_BT.shape)
    return model.decode(IDS_BT, positions_BT, cache)[0].hidden_BTD

  want = jax.jit(lambda p: nnx.merge(definition, p)(IDS_BT).hidden_BTD)(params)
  definition, params = split(decoding.unstack(model))
  np.testing.assert_allclose(decode(params), want, atol=1e-5)


@pytest.mark.slow
def test_a_cast_leaves_integers_alone(tiny_model_dir):
  model = models.init(tiny_model_dir(), 0, dtype='bfloat16', quantize='nf4')
  definition, params = split(model)
  flat = convert.flatten(cast(params, jnp.float32))
  dtypes = {x.dtype.name for name, x in flat.items() if name.endswith('kernel')}
  assert dtypes == {'uint4'}
  assert {x.dtype.name for x in flat.values()} == {'uint4', 'float32'}
  hidden = nnx.merge(definition, params)(IDS_BT).hidden_BTD
  assert hidden.dtype == jnp.bfloat16


@pytest.mark.slow
def test_an_adapter_goes_on_a_quantized_base(tiny_model_dir, tmp_path):
  source = tiny_model_dir()
  model = models.load(source)
  lora.attach(model, SOME, 0)
  for adapter in lora.adapters(model).values():
    adapter.b[...] += 0.1
  models.save(model, tmp_path / 'adapter')
  low = models.load(tmp_path / 'adapter', quantize='int8')
  want = _logits(model)
  off = np.linalg.norm(_logits(low) - want) / np.linalg.norm(want)
  assert 1e-4 < off < 0.03
  # Adapters alone are saved, and they name the base.
  models.save(low, tmp_path / 'again')
  np.testing.assert_allclose(
    _logits(models.load(tmp_path / 'again')), want, atol=1e-5
  )
  with pytest.raises(UserError, match='to merge adapters, load it without'):
    lora.merge(low)


def test_what_cannot_be_is_one_line(tiny_model_dir, tmp_path):
  source = tiny_model_dir()
  for function in (models.load, lambda p, **k: models.init(p, 0, **k)):
    with pytest.raises(UserError, match=r"'int4' is not known.* int8, nf4"):
      function(source, quantize='int4')
  with pytest.raises(UserError, match='projections are quantized cannot be'):
    models.save(models.load(source, quantize='nf4'), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
