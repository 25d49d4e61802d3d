"""Collectives of a program's text: kinds, sizes, loops and how often they run."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from omniopd_jax.parallel import sharding
from omniopd_jax.run import hlo

TEXT = textwrap.dedent("""\
    HloModule jit_f, is_scheduled=true

    %add (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %sum = f32[] add(%a, %b)
    }

    %inner_condition (p.1: (s32[], f32[8,4])) -> pred[] {
      %p.1 = (s32[], f32[8,4]) parameter(0)
      %i.1 = s32[] get-tuple-element(%p.1), index=0
      %n.1 = s32[] constant(3)
      ROOT %less.1 = pred[] compare(%i.1, %n.1), direction=LT
    }

    %inner_body (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %p.2 = (s32[], f32[8,4]) parameter(0)
      %x.2 = f32[8,4] get-tuple-element(%p.2), index=1
      %reduced = f32[8,4]{1,0} all-reduce(%x.2), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
      %gather.1 = bf16[16,4]{1,0} all-gather(%x.2), channel_id=7, replica_groups={{0,1},{2,3}}, dimensions={0}
      ROOT %t.2 = (s32[], f32[8,4]) tuple(%i.2, %reduced)
    }

    %body (p.3: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %p.3 = (s32[], f32[8,4]) parameter(0)
      %scattered = f32[2,4]{1,0} reduce-scatter(%x.3), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
      ROOT %while.1 = (s32[], f32[8,4]) while(%p.3), condition=%inner_condition, body=%inner_body
    }

    %condition (p.4: (s32[], f32[8,4])) -> pred[] {
      %p.4 = (s32[], f32[8,4]) parameter(0)
      ROOT %go = pred[] custom-call(%p.4), custom_call_target="unknown"
    }

    ENTRY %main (x: f32[8,4]) -> f32[8,4] {
      %x = f32[8,4] parameter(0)
      %start = (f32[8,4], f32[32,4]) all-gather-start(%x), channel_id=4, replica_groups=[1,4]<=[4], dimensions={0}
      %done = f32[32,4] all-gather-done(%start)
      %again = bf16[16,4]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1},{2,3}}, dimensions={0}
      ROOT %while.2 = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body, backend={"known_trip_count":{"n":"5"}}
    }
    """)


def test_a_programs_text_is_read_with_its_loops():
    found = {c.kind + str(c.dims): c for c in hlo.collectives(TEXT)}
    assert len(found) == 4
    reduced = found["all-reduce(8, 4)"]
    assert (reduced.loops, reduced.times, reduced.group, reduced.bytes) == (2, 15, 4, 128)
    assert reduced.moved == 2 * 3 / 4 * 128
    scattered = found["reduce-scatter(2, 4)"]
    assert (scattered.loops, scattered.times) == (1, 5) and scattered.moved == 3 / 4 * 128  # of what goes in
    gathered = found["all-gather(32, 4)"]
    assert (gathered.loops, gathered.times) == (0, 1) and gathered.moved == 3 / 4 * 32 * 4 * 4
    spread = found["all-gather(16, 4)"]  # one channel in two places: counted once, at the outermost
    assert (spread.loops, spread.times, spread.group) == (0, 1, 2) and spread.bytes == 16 * 4 * 2


@pytest.mark.parametrize(
    ("line", "dims", "size", "moved"),
    [
        ("((f32[8,4]{0,1}), f32[2,4]{0,1}) reduce-scatter-start(%x)", (8, 4), 128, 96),
        ("((f32[8,4], bf16[4,4]), (f32[2,4], bf16[1,4])) reduce-scatter-start(%x, %y)", (8, 4), 160, 120),
        ("((f32[2,4], bf16[1,4]), (f32[8,4], bf16[4,4])) all-gather-start(%x, %y)", (8, 4), 160, 120),
        ("(f32[2,4], bf16[4]) reduce-scatter(%x, %y)", (2, 4), 160, 120),
        ("(f32[8,4], f32[]) all-reduce-start(%x, %y)", (8, 4), 132, 198),
        ("(f32[8,4], f32[8,4], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)", (8, 4), 128, 128),
    ],
)
def test_joined_and_asynchronous_collectives_count_what_they_move(line, dims, size, moved):
    (one,) = hlo.collectives(
        f"ENTRY %main (x: f32[8,4]) -> f32[8,4] {{\n  %c = {line}, replica_groups=[1,4]<=[4]\n}}\n"
    )
    assert (one.dims, one.bytes, one.group, one.moved) == (dims, size, 4, moved)


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_programs_collectives_are_found(inside):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tp": 1}, jax.devices()[:4])
    rows, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

    def f(x):
        def body(_, total):
            return jax.lax.with_sharding_constraint((x * total.sum()).sum(0, keepdims=True), whole)

        first = jax.lax.with_sharding_constraint(x.sum(0, keepdims=True), whole)
        return jax.lax.fori_loop(0, 6, body, first) if inside else first

    text = jax.jit(f, in_shardings=rows, out_shardings=whole).lower(jnp.ones((8, 16))).compile().as_text()
    found = hlo.collectives(text)
    assert {c.kind for c in found} == {"all-reduce"} and all(c.group == 4 for c in found)
    assert max(c.bytes for c in found) == 64
    assert sum(c.times for c in found if c.loops) == (6 if inside else 0)
    assert sum(c.times for c in found if not c.loops) == 1
