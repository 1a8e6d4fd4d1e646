"""What a program moves, read from HLO: of each compiler's own, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gakd_jax import hlo, sharding

# As the GPU's compiler writes it: pairs, loops that say how often they turn.
GPU = """HloModule jit_f, num_partitions=8

%body.1 (p.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x.1 = bf16[4,8]{1,0} get-tuple-element(%p.1), index=1
  %all-gather-start.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x.1), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, metadata={op_name="layer/gather"}
  %work.1 = bf16[4,8]{1,0} fusion(%x.1), kind=kLoop
  %all-gather-done.1 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %t.1 = (s32[], bf16[4,8]{1,0}) tuple(%i.1, %x.1)
}

%scatter (p.2: f32[16]) -> f32[4] {
  %p.2 = f32[16]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4]{0} reduce-scatter(%p.2), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
}

%outer (p.3: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p.3 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%p.3), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %reduce-scatter-start = ((f32[16]{0}), f32[4]{0}) async-start(%y), calls=%scatter
  %reduce-scatter-done = f32[4]{0} async-done(%reduce-scatter-start), calls=%scatter
  ROOT %t.2 = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

ENTRY %main (p.4: bf16[4,8]) -> bf16[4,8] {
  %p.4 = bf16[4,8]{1,0} parameter(0)
  %while.2 = (s32[], bf16[4,8]{1,0}) while(%t), condition=%cond.2, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce.1 = (f32[2]{0}, s4[4]{0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %all-to-all.1 = pred[8]{0} all-to-all(%c), replica_groups={}, dimensions={0}
  ROOT %x = bf16[4,8]{1,0} get-tuple-element(%while.2), index=1
}
"""

# As the TPU's does: conditions tell, and what hides a transfer has a clone.
TPU = """HloModule jit_f, num_partitions=4

%start (p.1: bf16[1,8]) -> (bf16[1,8], bf16[4,8]) {
  %p.1 = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=8, replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p.2: bf16[1,8], p.3: bf16[4,8]) -> bf16[4,8] {
  %p.2 = bf16[1,8]{1,0} parameter(0)
  %all-gather.2 = bf16[4,8]{1,0} all-gather(%p.2), channel_id=8, replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, dimensions={0}
  ROOT %custom-call.2 = bf16[4,8]{1,0} custom-call(%p.2, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.4: f32[16,2]) -> f32[4,2] {
  %p.4 = f32[16,2]{1,0} parameter(0)
  %all-reduce.1 = f32[16,2]{1,0} all-reduce(%p.4), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %dynamic-slice.1 = f32[4,2]{1,0} dynamic-slice(%all-reduce.1, %i, %j), dynamic_slice_sizes={4,2}
}

%body (p.5: (bf16[1,8], u32[])) -> (bf16[1,8], u32[]) {
  %p.5 = (bf16[1,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %i.5 = u32[]{:T(128)} get-tuple-element(%p.5), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i.5, %two)
  %collective-permute-start.1 = (bf16[1,8]{1,0}, bf16[1,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %collective-permute-done.1 = bf16[1,8]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %t = (bf16[1,8]{1,0}, u32[]{:T(128)}) tuple(%x, %next)
}

%less (p.7: u32[]) -> pred[] {
  %p.7 = u32[]{:T(128)} parameter(0)
  %six = u32[]{:T(128)} constant(6)
  ROOT %lt.1 = pred[]{:T(512)} compare(%p.7, %six), direction=LT
}

%cond (p.6: (bf16[1,8], u32[])) -> pred[] {
  %p.6 = (bf16[1,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %i.6 = u32[]{:T(128)} get-tuple-element(%p.6), index=1
  ROOT %fused = pred[]{:T(512)} fusion(%i.6), kind=kLoop, calls=%less
}

%free (p.8: (bf16[1,8], u32[])) -> pred[] {
  %p.8 = (bf16[1,8]{1,0}, u32[]{:T(128)}) parameter(0)
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p.9: bf16[1,8]) -> bf16[1,8] {
  %p.9 = bf16[1,8]{1,0} parameter(0)
  %async-collective-start = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) fusion(%p.9), kind=kCustom, calls=%start
  %fusion.1 = f32[4,2]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %async-collective-done = bf16[4,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%done
  %while.1 = (bf16[1,8]{1,0}, u32[]{:T(128)}) while(%t1), condition=%cond, body=%body
  %while.2 = (bf16[1,8]{1,0}, u32[]{:T(128)}) while(%t2), condition=%free, body=%body
  ROOT %x = bf16[1,8]{1,0} get-tuple-element(%while.1), index=0
}
"""


def summary(text, turns=1):
  return [
    (t.kind, t.shapes, t.groups.tolist(), t.times, t.loops, t.sent)
    for t in hlo.transfers(text, turns)
  ]


def test_what_a_gpu_moves():
  gather, scatter, reduce, exchange = summary(GPU)
  halves = [[0, 2, 4, 6], [1, 3, 5, 7]]
  shapes = (('bf16', (16, 8)),)
  sent = 15 * 256 * 3 / 4
  assert gather == ('all-gather', shapes, halves, 15, 2, sent)
  assert scatter[:2] == ('reduce-scatter', (('f32', (4,)),))
  assert scatter[2:] == ([[0, 1, 2, 3], [4, 5, 6, 7]], 5, 1, 5 * 16 * 3)
  assert reduce[2] == [[0, 4], [1, 5], [2, 6], [3, 7]]
  assert reduce[3:] == (1, 0, 2 * (8 + 2) / 2)
  assert exchange[2:] == ([[*range(8)]], 1, 0, 8 * 7 / 8)
  found = hlo.transfers(GPU)
  assert found[0].name == 'layer/gather'
  assert [t.hidden for t in found] == [True, False, False, False]
  work = '  %work.2 = f32[4]{0} fusion(%y), kind=kLoop\n'
  done = '  %reduce-scatter-done'
  assert hlo.transfers(GPU.replace(done, work + done))[1].hidden


def test_names_that_begin_alike_are_others():
  """x.1 before x: what x moves is of its own shape."""
  first, second = (
    f'  %all-gather-start{n} = (bf16[{k},8], bf16[{4 * k},8]) all-gather-start'
    f'(%x.1), channel_id={k}, replica_groups=[2,4]<=[8], dimensions={{0}}\n'
    f'  %all-gather-done{n} = bf16[{4 * k},8] all-gather-done'
    f'(%all-gather-start{n})\n'
    for n, k in (('.1', 1), ('', 2))
  )
  text = f'ENTRY %main (x.1: bf16[4,8]) -> bf16[8,8] {{\n{first}{second}}}\n'
  shapes = [t.shapes for t in hlo.transfers(text)]
  assert shapes == [(('bf16', (4, 8)),), (('bf16', (8, 8)),)]


@pytest.mark.parametrize(
  'branches',
  [
    'true_computation=%sums, false_computation=%keeps',
    'true_computation=sums, false_computation=keeps',
    'branch_computations={%keeps, %sums}',
  ],
)
def test_a_condition_moves_what_its_branches_do(branches):
  text = f"""%sums (p.1: f32[8]) -> f32[8] {{
  %p.1 = f32[8]{{0}} parameter(0)
  ROOT %all-reduce.1 = f32[8]{{0}} all-reduce(%p.1), replica_groups={{{{0,1}}}}
}}

%keeps (p.2: f32[8]) -> f32[8] {{
  ROOT %p.2 = f32[8]{{0}} parameter(0)
}}

ENTRY %main (x.1: f32[8]) -> f32[8] {{
  ROOT %c.1 = f32[8]{{0}} conditional(%i, %x.1, %x.1), {branches}, metadata={{}}
}}
"""
  (moved,) = hlo.transfers(text, 2)
  assert (moved.kind, moved.shapes) == ('all-reduce', (('f32', (8,)),))


def test_what_a_tpu_moves():
  gather, scatter, known, free = summary(TPU, turns=20)
  sent = 64 * 1 / 2
  shapes = (('bf16', (4, 8)),)
  assert gather == ('all-gather', shapes, [[0, 2], [1, 3]], 1, 0, sent)
  assert scatter[:2] == ('reduce-scatter', (('f32', (4, 2)),))
  assert scatter[-1] == 128 * 3 / 4
  # 6 by steps of 2; as often as data say, here 20.
  assert [x[0] for x in (known, free)] == ['collective-permute'] * 2
  assert known[3:] == (3, 1, 3 * 16)
  assert free[3:] == (20, 1, 20 * 16)


def test_half_of_an_axis_is_a_group():
  line = "replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}"
  text = TPU.replace('replica_groups=[1,4]<=[4]', line)
  text = text.replace('num_partitions=4', 'num_partitions=8')
  assert summary(text)[1][2] == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_a_notation_that_is_new_is_not_guessed():
  with pytest.raises(AssertionError, match='replica_groups=new'):
    hlo.transfers(
      TPU.replace('replica_groups=[1,4]<=[4]', 'replica_groups=new')
    )


def test_arrays_are_all_that_are_named():
  found = hlo.arrays(TPU)
  assert {('bf16', (4, 8)), ('f32', (16, 2)), ('u32', ())} <= found


def test_what_is_compiled_here_moves_what_it_says():
  mesh = sharding.make_mesh(data=2, fsdp=4)

  def local(x_TD):
    def layer(x_TD, _):
      whole_TD = jax.lax.all_gather(x_TD, 'fsdp', axis=1, tiled=True)
      part_TD = jax.lax.psum_scatter(
        jnp.sin(whole_TD), 'fsdp', scatter_dimension=1, tiled=True
      )
      return part_TD, None

    x_TD = jax.lax.scan(layer, x_TD, length=7)[0]
    x_TD = jax.lax.ppermute(x_TD, 'fsdp', [(0, 1), (1, 0)])
    x_TD = jax.lax.all_to_all(x_TD, 'data', 1, 0, tiled=True)
    return x_TD + jax.lax.psum(jnp.cos(x_TD), ('data', 'fsdp'))

  f = jax.shard_map(
    local, mesh=mesh, in_specs=P('data', 'fsdp'), out_specs=P('data', 'fsdp')
  )
  x_TD = np.ones((12, 32), np.float32)
  found = hlo.transfers(jax.jit(f).lower(x_TD).compile().as_text())
  size = 6 * 8 * 4  # bytes on a device
  assert {t.kind: (t.times, t.sent) for t in found} == {
    'all-gather': (7, 7 * 3 * size),
    'reduce-scatter': (7, 7 * 3 * size),
    'collective-permute': (1, size),
    'all-to-all': (1, size / 2),
    'all-reduce': (1, 2 * size * 7 / 8),
  }
  by_kind = {t.kind: t for t in found}
  assert by_kind['all-gather'].groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert by_kind['all-to-all'].groups.shape == (4, 2)
  assert by_kind['all-gather'].loops == 1
