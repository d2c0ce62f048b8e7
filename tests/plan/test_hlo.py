"""The text of compiled programs, read: how often loops go round, what products cost, what is sent and what is read."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxdpo.plan.collectives import Collective
from jaxdpo.plan.costs import NOTHING, Costs, costs_of, product_flops
from jaxdpo.plan.hlo import Instruction, Shape, parse
from jaxdpo.sharding import make_mesh

N = 64


def costs(function, *arguments, **trips) -> Costs:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return costs_of(parse(text, trips))


def array(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def powers(x, *, rounds, inner=1):
    """`rounds` times `inner` products of two N x N matrices."""

    def outer(x, _):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=inner)[0], None

    return jax.lax.scan(outer, x, length=rounds)[0]


def test_the_body_of_a_loop_in_a_loop_counts_as_often_as_it_runs():
    found = costs(functools.partial(powers, rounds=5, inner=7), array(N, N))
    assert found.flops == 5 * 7 * 2 * N**3


def test_the_gradient_of_a_scan_of_recomputed_layers():
    layers, tokens = 6, 32

    def loss(w, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jax.lax.scan(layer, x, w)[0].sum()

    found = costs(jax.grad(loss), array(layers, N, N), array(tokens, N))
    product = 2 * tokens * N * N
    assert found.flops == pytest.approx(layers * 4 * product, rel=0.05)  # forward, again, and two gradients


def test_a_loop_whose_count_the_program_does_not_know_goes_by_its_name():
    def run(x, number):
        with jax.named_scope("rounds"):
            return jax.lax.fori_loop(0, number, lambda _, x: x @ x, x)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    assert costs(run, array(N, N), number, rounds=9).flops == 9 * 2 * N**3
    with pytest.raises(ValueError, match=r"loop \S+ \(jit\(run\)/rounds/while\) does not tell how often it runs"):
        costs(run, array(N, N), number)


WHILE = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %two = s32[] constant(2)
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%i, %two)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %sent = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %sent)
}

%condition (q: (s32[], f32[4])) -> pred[] {
  %end = s32[] constant(11)
  %q = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %three = s32[] constant(3)
  %a = f32[4]{0} parameter(0)
  %start = (s32[], f32[4]{0}) tuple(%three, %a)
  %loop = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def test_a_counter_that_starts_late_and_takes_two_steps_at_once():
    """As TPU compilers leave loops that send parts of a matrix around: from 3 below 11 by twos."""
    assert costs_of(parse(WHILE)).collectives == (Collective("collective-permute", "ici", 4 * 16.0, 4.0),)


def convolution(lhs, rhs, out, attributes):
    operands = [
        Instruction(name, "parameter", (Shape("f32", dims, 0),), "", "") for name, dims in (("l", lhs), ("r", rhs))
    ]
    instruction = Instruction("c", "convolution", (Shape("f32", out, 0),), "%l, %r", attributes)
    return product_flops(instruction, {item.name: item for item in (*operands, instruction)})


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "flops"),
    [
        ((8, 6), (6, 5), (8, 5), ", dim_labels=bf_io->bf", 2 * 8 * 6 * 5),
        # Two parts of what is contracted: the second is a window that takes both at once.
        ((8, 2, 6), (2, 6, 5), (8, 5, 1), ", window={size=2}, dim_labels=b0f_0io->bf0", 2 * 8 * 12 * 5),
        # A batch of 3 products as a window over its own padding: each of 3 places meets one number of the other.
        (
            (3, 8, 6),
            (3, 6, 5),
            (3, 8, 5),
            ", window={size=3 stride=2 pad=2_2 lhs_dilate=3 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            2 * 8 * 6 * 5 * 3,
        ),
    ],
    ids=["matrices", "contracted-in-parts", "batch"],
)
def test_products_that_are_written_as_convolutions(lhs, rhs, out, attributes, flops):
    assert convolution(lhs, rhs, out, attributes) == flops


@pytest.mark.parametrize(
    ("into", "kind", "share"),
    [(jax.P(), "all-gather", 7 / 8), (jax.P(None, "fsdp"), "all-to-all", 7 / 64)],
)
def test_bytes_of_an_array_that_is_laid_out_anew(into, kind, share):
    mesh = make_mesh()
    sharded, size = jax.NamedSharding(mesh, jax.P("fsdp")), 4 * 512 * 512
    text = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, into)).lower(array(512, 512, sharding=sharded))
    (found,) = costs_of(parse(text.compile().as_text())).collectives
    assert (found.kind, found.network, found.calls) == (kind, "ici", 1)
    assert found.bytes == pytest.approx(share * size)


def test_bytes_of_a_sum_over_devices():
    mesh = make_mesh()
    rows, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("fsdp"), jax.P()))
    product = jax.jit(lambda x, y: x.T @ y, out_shardings=whole)
    text = product.lower(array(512, N, sharding=rows), array(512, N, sharding=rows)).compile().as_text()
    (found,) = costs_of(parse(text)).collectives
    assert found.kind == "all-reduce"
    assert found.bytes == 2 * 7 / 8 * 4 * N * N


SENT = """
ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %go = token[] after-all()
  %send = (f32[1024]{0}, u32[], token[]) send(%a, %go), channel_id=2, is_host_transfer=true, frontend_attributes={\
_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %fusion = f32[1024]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}

%all-reduce-scatter (input: f32[1024]) -> f32[256] {
  %input = f32[1024]{0} parameter(0)
  %all-reduce.1 = f32[1024]{0} all-reduce(%input), replica_groups=GROUPS, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = f32[256]{0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={256}
}
"""


@pytest.mark.parametrize("groups", ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}"])
def test_what_goes_within_a_slice_and_what_between_slices(groups):
    program = parse(SENT.replace("GROUPS", groups))
    within, between = sorted(costs_of(program, slices=2).collectives, key=lambda item: item.network, reverse=True)
    assert within == Collective("reduce-scatter", "ici", 3 / 4 * 4096, 1.0)
    assert between == Collective("all-reduce", "dcn", 2 * 1 / 2 * 4096, 1.0)


def test_what_a_program_reads_and_writes():
    assert costs(lambda x: x + 1, array(1024)).bytes == 2 * 4 * 1024


def test_a_loop_over_layers_reads_each_layer_once():
    """What a loop cuts out of an array counts, not the array: whole ones, read and written 8 times, would be 16."""
    found = costs(lambda x, w: jax.lax.scan(lambda x, w: (x + w, x), x, w), array(N, N), array(8, N, N))
    of_layers = 8 * 4 * N * N
    assert 3 * of_layers <= found.bytes < 10 * of_layers


def test_costs_add_up():
    one = Costs(1.0, 2.0, (Collective("all-gather", "ici", 3.0, 1.0),))
    two = Costs(1.0, 2.0, (Collective("all-gather", "ici", 4.0, 2.0), Collective("all-gather", "dcn", 5.0, 1.0)))
    both = sum([one.times(2), two], NOTHING)
    assert (both.flops, both.bytes) == (3.0, 6.0)
    assert both.network_bytes("ici") == 10.0 and both.network_bytes("dcn") == 5.0
    assert both.collectives[1] == Collective("all-gather", "ici", 10.0, 4.0)


def test_kernels_count_by_their_name():
    text = "ENTRY %m (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n  ROOT %k = f32[8]{0} custom-call(%a), "
    text += 'custom_call_target="tpu_custom_call", kernel={\n"x":"y"\n}, metadata={op_name="jit(f)/splash_mha_dq"}\n}\n'
    assert costs_of(parse(text), kernels={"splash_mha_dq": 7.0, "splash_mha_fwd": 100.0}).flops == 7.0
