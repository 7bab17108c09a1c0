"""Programs written by hand in the spelling of CPU, GPU and TPU, and compiled ones whose counts are known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrlhf.plan import hlo
from jaxrlhf.plan.hlo import text
from jaxrlhf.plan.hlo.walk import walk

ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}\n"


def program(entry: str, others: str = "", head: str = "num_partitions=8") -> str:
    return f"HloModule m, is_scheduled=true, {head}\n\n{ADD}\n{others}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{entry}\n}}\n"


class Loop(NamedTuple):
    name: str
    trips: int | None  # None where the number of rounds cannot be read
    times: int | None  # how often the loop is entered


def loops(written: str) -> list[Loop]:
    """Every while loop that runs, the outer before the inner."""
    found = text.read(written)
    places = [place for place in walk(found, lambda where, line: 1, None) if place.line.opcode == "while"]
    return [Loop(place.line.name, text.trips(found, place.computation, place.line), place.times) for place in places]


def shapes(found) -> list[tuple[list[str], list[str]]]:
    return [([str(s) for s in one.operands], [str(s) for s in one.results]) for one in found]


NESTED = """
%inner (q: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %q = (s32[], f32[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[4,6]{1,0} get-tuple-element(%q), index=1
  %sum = f32[4,6]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %t = (s32[], f32[4,6]{1,0}) tuple(%next, %sum)
}

%inner_more (q: (s32[], f32[4,6])) -> pred[] {
  %q = (s32[], f32[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(END)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%outer (r: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %r = (s32[], f32[4,6]{1,0}) parameter(0)
  %start = s32[] constant(START)
  %y = f32[4,6]{1,0} get-tuple-element(%r), index=1
  %from = (s32[], f32[4,6]{1,0}) tuple(%start, %y)
  %run = (s32[], f32[4,6]{1,0}) while(%from), condition=%inner_more, body=%inner
  ROOT %u = (s32[], f32[4,6]{1,0}) tuple(%start, %y)
}

%outer_more (r: (s32[], f32[4,6])) -> pred[] {
  %r = (s32[], f32[4,6]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}
"""
OUTER = "  %p = (s32[], f32[4,6]{1,0}) parameter(0)\n  ROOT %w = (s32[], f32[4,6]{1,0}) while(%p), condition=%outer_more, body=%outer"
KNOWN = ', backend_config={"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize("start, end, rounds", [(0, 3, 3), (1, 3, 2), (-2, 3, 5), (4, 3, 0)])
def test_loops_in_loops_multiply(start, end, rounds):
    others = NESTED.replace("START", str(start)).replace("END", str(end))
    (sent,) = hlo.collectives(program(OUTER + KNOWN, others))
    assert (sent.kind, sent.times, sent.bytes, sent.group_size) == ("all-reduce", 5 * rounds, 4 * 6 * 4, 4)
    assert sent.total == 5 * rounds * 96 and sent.sent == pytest.approx(2 * 96 * 3 / 4)
    assert [(one.name, one.trips, one.times) for one in loops(program(OUTER + KNOWN, others))] == [("w", 5, 1), ("run", rounds, 5)]


def test_a_loop_of_unknown_length_says_so_unless_the_caller_knows():
    others = NESTED.replace("START", "0").replace("END", "3")
    text = program(OUTER, others)
    assert [one.trips for one in loops(text)] == [None, 3]
    (sent,) = hlo.collectives(text)
    assert sent.times is None and sent.total is None
    assert hlo.collectives(text, unknown_trips=7)[0].times == 21
    moving = others.replace("add(%i, %one)", "multiply(%i, %one)")
    assert [one.trips for one in loops(program(OUTER, moving))] == [None, None]
    down = NESTED.replace("START", "9").replace("END", "2").replace("LT", "GT").replace("constant(1)", "constant(-3)")
    assert loops(program(OUTER + KNOWN, down))[1].trips == 3
    assert loops(program(OUTER + KNOWN, down.replace("GT", "GE")))[1].trips == 3
    assert loops(program(OUTER + KNOWN, down.replace("GT", "GE").replace("constant(2)", "constant(3)")))[1].trips == 3
    assert loops(program(OUTER + KNOWN, down.replace("GT", "LT")))[1].trips is None


def test_the_condition_of_a_loop_runs_once_more_than_its_body():
    others = NESTED.replace("START", "0").replace("END", "3")
    asks = others.replace(
        "ROOT %yes = pred[] constant(true)", "%yes = pred[] constant(true)\n  ROOT %all = pred[] all-reduce(%yes), to_apply=%add"
    )
    assert [(one.times, one.bytes) for one in hlo.collectives(program(OUTER + KNOWN, asks))] == [(5 + 1, 1), (5 * 3, 96)]


def test_every_kind_has_its_bytes_and_its_group():
    entry = """
  %p = f32[4]{0} parameter(0)
  %m = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %gather = bf16[8,64]{1,0:T(8,128)} all-gather(%m), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}, use_global_device_ids=true
  %scatter = bf16[8,4]{1,0} reduce-scatter(%m), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, to_apply=%add
  %both = (f32[4]{0}, /*index=1*/pred[3]{0}) all-reduce(%p, %flags), replica_groups={}, to_apply=%add
  %flags = pred[3]{0} parameter(2)
  %swap = (f32[2]{0}, f32[2]{0}) all-to-all(%half, %half), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %half = f32[2]{0} parameter(3)
  ROOT %shift = f32[4]{0} collective-permute(%p), channel_id=3, source_target_pairs={{0,1},{1,2},{2,0}}"""
    found = hlo.collectives(program(entry))
    assert [(one.kind, one.bytes, one.group_size) for one in found] == [
        ("all-gather", 8 * 64 * 2, 4),
        ("reduce-scatter", 8 * 16 * 2, 4),
        ("all-reduce", 16 + 3, 8),
        ("all-to-all", 16, 2),
        ("collective-permute", 16, 3),
    ]
    assert [one.sent for one in found] == pytest.approx([1024 * 3 / 4, 256 * 3 / 4, 2 * 19 * 7 / 8, 8, 16])
    assert shapes(found)[0] == (["bf16[8,16]"], ["bf16[8,64]"])


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{}", 8),
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=1] {'axis_1'}", 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b'}", 8),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", 4),
        ("something_new", None),
    ],
)
def test_groups_are_read_in_every_spelling(groups, size):
    entry = (
        f"  %p = f32[4]{{0}} parameter(0)\n  ROOT %r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, dimensions={{0}}, to_apply=%add"
    )
    (sent,) = hlo.collectives(program(entry))
    assert sent.group_size == size
    assert sent.sent == pytest.approx(2 * 16 * (1 if size is None else (size - 1) / size))


def test_asynchronous_pairs_count_once_in_every_spelling():
    others = """
%wrapped (w: f32[8]) -> f32[2] {
  %w = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%w), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}"""
    entry = """
  %p = f32[4]{0} parameter(0)
  %big = f32[8]{0} parameter(1)
  %ag = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}
  %cp = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %ar = (f32[4]{0}, f32[8]{0}) all-reduce-start(%p, %big), replica_groups={}, to_apply=%add
  %as = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%big), async_execution_thread="parallel", calls=%wrapped
  %au = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%as), calls=%wrapped
  %agd = f32[16]{0} all-gather-done(%ag)
  %cpd = f32[4]{0} collective-permute-done(%cp)
  %ard = (f32[4]{0}, f32[8]{0}) all-reduce-done(%ar)
  ROOT %ad = f32[2]{0} async-done(%au), calls=%wrapped"""
    found = hlo.collectives(program(entry, others))
    assert [(one.kind, one.times) for one in found] == [
        (kind, 1) for kind in ("all-gather", "collective-permute", "all-reduce", "reduce-scatter")
    ]
    assert [one.bytes for one in found] == [64, 16, 48, 32]
    assert shapes(found)[:2] == [(["f32[4]"], ["f32[16]"]), (["f32[4]"], ["f32[4]"])]


BRANCHES = """
%few (c: f32[4]) -> f32[4] {
  %c = f32[4]{0} parameter(0)
  %g = f32[4,4]{1,0} dot(%c, %c), lhs_contracting_dims={}, rhs_contracting_dims={}
  ROOT %ar0 = f32[4]{0} all-reduce(%c), replica_groups={}, to_apply=%add
}

%many (c: f32[4]) -> f32[4] {
  %c = f32[4]{0} parameter(0)
  %ag1 = f32[32]{0} all-gather(%c), replica_groups={}, dimensions={0}
  ROOT %d = f32[4]{0} slice(%ag1), slice={[0:4]}
}
"""


def test_of_a_conditional_the_larger_branch_is_counted_and_that_is_said():
    entry = "  %p = f32[4]{0} parameter(0)\n  %i = s32[] parameter(1)\n  ROOT %c = f32[4]{0} conditional(%i, %p, %p), "
    listed = program(entry + "branch_computations={%few, %many}", BRANCHES)
    named = program(entry + "true_computation=%few, false_computation=%many", BRANCHES)
    for written in (listed, named):
        assert [(one.kind, one.branch) for one in hlo.collectives(written)] == [("all-gather", True)]
        assert [(one.flops, one.branch) for one in hlo.matmuls(written)] == [(2 * 16, True)]  # the larger in FLOPs is the other one


def test_calls_of_libraries_are_products_where_their_shapes_say_so():
    axes = '"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["1"]'
    config = f'backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{{axes}}}}}}}'
    old = config.replace('"', '\\"').replace("={", '="{', 1) + '"'
    entry = f"""
  %a = f32[5,7]{{1,0}} parameter(0)
  %b = f32[3,5]{{1,0}} parameter(1)
  %x = f32[2,7,5]{{2,1,0}} parameter(2)
  %y = f32[5,3]{{1,0}} parameter(3)
  %z = f32[2,5,3]{{2,1,0}} parameter(4)
  %lt = (f32[7,3]{{1,0}}, s8[1024]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", {config}
  %gemm = f32[7,3]{{1,0}} custom-call(%a, %b), custom_call_target="__cublas$gemm", {old}
  %one = f32[2,7,3]{{2,1,0}} custom-call(%x, %y), custom_call_target="__onednn$matmul"
  %batched = f32[2,7,3]{{2,1,0}} custom-call(%x, %z), custom_call_target="__onednn$matmul"
  %fmha = f32[2,7,3]{{2,1,0}} custom-call(%x, %z), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %k = f32[7,3]{{1,0}} custom-call(%lt), custom_call_target="annotate_device_placement" """
    text = program(entry)
    assert [one.flops for one in hlo.matmuls(text)] == [2 * 7 * 3 * 5, 2 * 7 * 3 * 5, 2 * 2 * 7 * 3 * 5, 2 * 2 * 7 * 3 * 5]


def test_products_that_a_tpu_writes_as_convolutions():
    entry = """
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[64,128]{1,0} parameter(1)
  %c = bf16[32,128]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  %x = f32[8,5,6]{2,1,0} parameter(2)
  %y = f32[8,6,7]{2,1,0} parameter(3)
  ROOT %z = f32[8,5,7]{2,1,0} convolution(%x, %y), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf"""
    assert [one.flops for one in hlo.matmuls(program(entry))] == [2 * 32 * 64 * 128, 2 * 8 * 5 * 6 * 7]


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        text.read("HloModule m\n")


WIDTH, ROUNDS = 16, 3


def test_a_compiled_scan_over_four_devices():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))

    def local(x_BD, w_DD):
        def body(x_BD, _):
            x_BD = jnp.tanh(x_BD @ w_DD)
            return x_BD - jax.lax.psum(x_BD.sum(0), "data"), None

        x_BD, _ = jax.lax.scan(body, x_BD, None, length=ROUNDS)
        return jax.lax.all_gather(x_BD, "data", tiled=True)

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=False))
    arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((8, WIDTH), (WIDTH, WIDTH))]
    text = step.lower(*arrays).compile().as_text()
    found = [(one.kind, one.times, one.bytes, one.group_size) for one in hlo.collectives(text)]
    assert found == [("all-reduce", ROUNDS, 4 * WIDTH, 4), ("all-gather", 1, 4 * 8 * WIDTH, 4)]
    assert "psum" in hlo.collectives(text)[0].source
    assert hlo.matmul_flops(text) == ROUNDS * 2 * 2 * WIDTH * WIDTH
    without = text.replace("known_trip_count", "forgotten")
    assert [one.trips for one in loops(without)] == [ROUNDS]  # read from the loop's condition


def products(jaxpr, times: int = 1) -> int:
    """FLOPs of the dot_generals of a program before compilation."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            inner = np.prod([equation.invars[0].aval.shape[axis] for axis in axes])
            total += times * 2 * int(np.prod(equation.outvars[0].aval.shape) * inner)
        rounds = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner_jaxpr = getattr(value, "jaxpr", value)
            if hasattr(inner_jaxpr, "eqns"):
                total += products(inner_jaxpr, times * rounds)
    return total


def test_flops_of_a_compiled_gradient_are_those_of_its_source():
    def loss(params, x_BTD):
        def layer(x_BTD, w_DD):
            scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x_BTD @ w_DD, x_BTD))
            return x_BTD + jnp.einsum("bts,bsd->btd", scores, x_BTD), None

        return (jax.lax.scan(layer, x_BTD, params)[0] ** 2).sum()

    arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((3, 8, 8), (4, 6, 8))]
    step = jax.grad(loss)
    counted = hlo.matmul_flops(jax.jit(step).lower(*arrays).compile().as_text())
    assert counted == products(jax.make_jaxpr(step)(*arrays).jaxpr) > 0


def test_bytes_of_what_is_read_through_slices_and_written_in_place():
    def step(table_ND, rows_RD):
        def body(carry, row):
            picked = jax.lax.dynamic_slice_in_dim(table_ND, carry, 1)
            return carry + 1, jnp.sin(row) + picked[0]

        return jax.lax.scan(body, 0, rows_RD)[1]

    rows, table, width = 50, 4000, 128
    arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((table, width), (rows, width))]
    counted = hlo.bytes_accessed(jax.jit(step).lower(*arrays).compile().as_text())
    least = rows * width * 4 * 3  # a row of each read, one written
    assert least <= counted <= 2 * least + 2 * rows * width * 4 < table * width * 4
