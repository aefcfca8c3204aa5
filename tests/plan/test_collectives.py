"""Bytes that a program sends: from its text, and equal to arithmetic where the program is known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain_jax.core import sharding
from posttrain_jax.plan import collectives, report
from posttrain_jax.plan.collectives import Collective

MESH = functools.partial(sharding.mesh, data=2, fsdp=2, tensor=2)
# a loop of five over an asynchronous gather, as the CUDA plugin prints one
LOOP = """
%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %start = ((bf16[2,8]), (bf16[4,8]{1,0})) all-gather-start(%x), channel_id=3, replica_groups=[4,2]<=[4,2]T(1,0)
  %done = (bf16[4,8]{1,0}) all-gather-done(%start)
}

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %loop = (s32[], bf16[4,8]) while(%start), condition=%cond, body=%body
  %send = (f32[7,8]{1,0}, u32[], token[]) send(%x, %token), attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def compiled(spec, out, f, mesh):
  x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
  return jax.jit(f, out_shardings=NamedSharding(mesh, out)).lower(x).compile().as_text()


def test_a_gather_sends_what_the_others_have_not():
  mesh = MESH()
  (one,) = collectives.read(compiled(P("fsdp"), P(), lambda x: x * 2, mesh), mesh)
  assert one == Collective("all-gather", "fsdp", 1, 16 * 16 * 4 // 2, 0)


@pytest.mark.parametrize(("axes", "slices", "sent", "network"), [
  ("data", 1, 1, 0), ("data", 2, 0, 1), (("data", "fsdp"), 2, 1, 0.5), ("fsdp", 2, 1, 0),
])  # fmt: skip
def test_a_sum_sends_its_array_once_each_way(axes, slices, sent, network):
  """2 (n - 1) / n of it among two; from slice to slice half of it, where two devices share that."""
  mesh = MESH()
  summed = compiled(P(axes), P(), lambda x: x.sum(0), mesh)
  slice_of = {d.id: i * slices // 8 for i, d in enumerate(mesh.devices.flat)}
  (one,) = collectives.read(summed, mesh, slice_of)
  names = axes if isinstance(axes, str) else "+".join(axes)
  size = 16 * 4
  assert one == Collective("all-reduce", names, 1, int(sent * size), int(network * size))


def test_loops_and_what_crosses_slices_are_counted():
  found = collectives.read(LOOP, MESH())
  # the groups are (0, 2), (4, 6), ...
  assert Collective("all-gather", "fsdp", 5, 5 * 4 * 8 * 2 // 2, 0) in found
  assert Collective("send all-reduce", "slices", 1, 0, 7 * 8 * 4) in found


@pytest.mark.parametrize(("old", "new", "times", "exact"), [
  # the name of an attribute is the compiler's to choose
  ("condition=%cond, body=%body", 'async_calls={%cond, %body}, backend_config={"known_trip_count":{"n":"7"}}', 7, True),
  # no call that leads there, and a loop that ends when it likes: it is counted once, and said
  ("condition=%cond, body=%body", "", 1, False),
  ("constant(5)", "parameter(0)", 1, False),
])  # fmt: skip
def test_what_no_known_call_leads_to_is_counted_and_said(old, new, times, exact):
  assert old in LOOP
  found = collectives.read(LOOP.replace(old, new), MESH())
  assert Collective("all-gather", "fsdp", times, times * 4 * 8 * 2 // 2, 0, exact) in found
  sent = [dataclasses.asdict(one) for one in found]
  assert ("at least" in "\n".join(report._sent(sent, []))) == (not exact)


@pytest.mark.parametrize(("step", "times"), [(1, 8), (2, 4), (3, 3)])
def test_a_loop_whose_turns_are_taken_together_is_counted_as_often_as_it_runs(step, times):
  """As libtpu prints a product that passes its parts on while it multiplies: an unsigned counter, and turns by twos."""
  text = f"""
%body (p: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {{
  %two = u32[]{{:T(128)}} constant({step})
  %start = (bf16[4,8], bf16[4,8], u32[]) collective-permute-start(%x), source_target_pairs={{{{0,2}},{{2,0}}}}
  %one = u32[] get-tuple-element(%p), index=1
  %next = u32[]{{:T(128)}} add(%one, %two)
  ROOT %both = (bf16[4,8], u32[]) tuple(%start, /*index=1*/%next)
}}

%cond (p: (bf16[4,8], u32[])) -> pred[] {{
  %bound = u32[]{{:T(128)}} constant(8)
  %counter = u32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {{
  %loop = (bf16[4,8], u32[]) while(%start), condition=%cond, body=%body
}}
"""
  (one,) = collectives.read(text, MESH())
  assert one == Collective("collective-permute", "fsdp", times, times * 4 * 8 * 2, 0)


def test_what_follows_a_kernel_in_a_loop_is_counted():
  """Attributes of a kernel, as libtpu prints those of splash: over several lines, which begin with a brace too."""
  kernel = [
    "  %splash = bf16[2,8]{1,0} custom-call(%x), frontend_attributes={kernel_metadata={",
    '"xprof_metadata":"{\\"block_q\\": 512}"',
    '}}, metadata={op_name="jit(step)/while/body/splash"}',
  ]
  body = "%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {\n"
  assert body in LOOP
  behind = LOOP.replace(body, "\n".join([body.strip(), *kernel, ""]))
  assert collectives.read(behind, MESH()) == collectives.read(LOOP, MESH())


def test_parts_of_one_transfer_are_one_and_those_of_a_shard_map_are_several():
  """As libtpu prints them: a chain of three parts; two gathers that share channel 1, as all of a shard_map do."""
  gather = "  %%g.%d = bf16[4,8]{1,0} all-gather(%%x), channel_id=%d, replica_groups={{0,1},{2,3},{4,5},{6,7}}%s"
  chain = ', frontend_attributes={chain_id="%d"}'
  parts = [gather % (i, 1, chain % 11) for i in range(3)] + [gather % (3, 1, chain % 12)]
  parts += [gather % (4, 1, ""), gather % (5, 1, ""), gather % (6, 7, ""), gather % (7, 7, "")]
  text = "\n".join(["ENTRY %main (x: bf16[2,8]) -> bf16[4,8] {", *parts, "}"])
  (one,) = collectives.read(text, MESH())
  assert one == Collective("all-gather", "tensor", 5, 5 * 4 * 8 * 2 // 2, 0)


def test_a_sum_of_which_each_takes_a_part_sends_half_of_one():
  """As libtpu prints it: a fusion by that name of the sum of the whole and of the slice of it."""
  text = """
%NAME.1.clone.1 (input: f32[16,8]) -> f32[8,8] {
  %sum = f32[16,8]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add
  ROOT %slice = f32[8,8]{1,0} dynamic-slice(%sum, %index, %zero), dynamic_slice_sizes={8,8}
}

ENTRY %main (x: f32[16,8]) -> f32[8,8] {
  ROOT %fusion = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%NAME.1.clone.1
}
"""
  read = lambda name: collectives.read(text.replace("NAME", name), MESH())
  size = 16 * 8 * 4
  assert read("all-reduce-scatter") == [Collective("reduce-scatter", "fsdp", 1, size // 2, 0)]
  assert read("fused_computation") == [Collective("all-reduce", "fsdp", 1, size, 0)]


@pytest.mark.parametrize(("text", "groups"), [
  ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
  ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
  ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
  ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
  ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
  ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
  ("replica_groups={}, x", [[0, 1, 2, 3]]),
])  # fmt: skip
def test_every_way_to_write_groups_is_read(text, groups):
  np.testing.assert_array_equal(collectives._groups(text, 4), groups)
