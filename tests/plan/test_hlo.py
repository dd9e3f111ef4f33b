"""What a scheduled module's text looks like where a naive reader drops something."""

# ruff: noqa: E501 (a line of HLO is as long as it is)

from __future__ import annotations

import pytest

from internvl_jax.plan.cost import matrix_flops, traffic
from internvl_jax.plan.hlo import HOST, VMEM, HloError, parse
from internvl_jax.plan.trips import Scope, TripCountError


def module(entry: str, *computations: str, header: str = "num_partitions=8"):
    body = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return parse(
        f"HloModule jit_step, is_scheduled=true, {header}\n\n"
        + "\n".join(text.strip() + "\n" for text in computations)
        + f"\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    )


def flops(found, name: str) -> float:
    return matrix_flops(found, found.entry, found.entry.by_name[name])


def hbm(found, name: str) -> int:
    return traffic(found, found.entry, found.entry.by_name[name]).hbm


def test_layouts_name_tiles_and_memory():
    found = module("ROOT %p = bf16[320,80,99]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)")
    (shape,) = found.entry.root.shapes
    assert (shape.dtype, shape.dims, shape.order) == ("bf16", (320, 80, 99), (1, 2, 0))
    assert (shape.tiles, shape.space) == (((8, 128), (2, 1)), VMEM)
    assert shape.bytes == 320 * 80 * 99 * 2
    assert shape.stored_bytes == 320 * 128 * 104 * 2
    scalar = module("ROOT %p = s32[]{:T(128)} parameter(0)").entry.root.shapes[0]
    assert scalar.bytes == scalar.stored_bytes == 4


def test_long_tuples_are_read_past_their_index_comments():
    found = module(
        """
        %p = (f32[1]{0}, f32[2]{0}, f32[3]{0}, f32[4]{0}, f32[5]{0}, /*index=5*/f32[6]{0:T(8)}) parameter(0)
        ROOT %t = f32[6]{0} get-tuple-element(%p), index=5, metadata={op_name="a, b" stack_frame_id=3}
        """
    )
    assert [s.dims[0] for s in found.entry.by_name["p"].shapes] == [1, 2, 3, 4, 5, 6]
    assert found.entry.root.integers("index") == (5,)
    assert (found.entry.root.op_name, found.entry.root.frame) == ("a, b", 3)
    assert found.partitions == 8


def test_newlines_and_braces_in_a_kernels_metadata_drop_nothing():
    metadata = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block\\": 128}"\n}}'
    found = module(
        f"""
        %a = f32[64,32]{{1,0}} parameter(0)
        %kernel.3 = f32[64,32]{{1,0}} custom-call(%a), custom_call_target="tpu_custom_call", {metadata}, metadata={{op_name="attend" stack_frame_id=1}}
        %after = f32[64,64]{{1,0}} dot(%kernel.3, %kernel.3), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
        ROOT %last = f32[64,64]{{1,0}} copy(%after), {metadata}
        """
    )
    assert [op.name for op in found.entry.ops] == ["a", "kernel.3", "after", "last"]
    assert found.entry.by_name["kernel.3"].op_name == "attend"
    assert flops(found, "after") == 2 * 64 * 64 * 32


def test_a_text_that_is_no_module_is_an_error():
    with pytest.raises(HloError, match="no ENTRY"):
        parse("digraph G {}")


def test_frames_name_the_function_and_its_caller():
    tables = (
        'FileNames\n1 "/a/b/dense.py"\n2 "mlp.py"\n\nFunctionNames\n1 "dense"\n2 "Mlp.__call__"\n\n'
        "FileLocations\n1 {file_name_id=2 function_name_id=2 line=48 end_line=48 column=1}\n"
        "2 {file_name_id=1 function_name_id=1 line=24 end_line=24 column=1}\n\n"
        "StackFrames\n1 {file_location_id=1 parent_frame_id=1}\n"
        "2 {file_location_id=2 parent_frame_id=2}\n\n"
    )
    text = "HloModule m\n\n" + tables + "ENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(1)\n}\n"
    assert parse(text).sources == {
        1: "Mlp.__call__ (mlp.py:48)",
        2: "dense (dense.py:24) < Mlp.__call__ (mlp.py:48)",
    }


# ---- loops

LESS = """
%less (s: (s32[], f32[8], s32[])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8]{0}, s32[]) parameter(0)
  %n = s32[]{:T(128)} constant(48)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
"""
ADD = """
%add (s: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %s = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %by = s32[] get-tuple-element(%s), index=2
  %next = s32[] add(%i, %by)
  ROOT %t = (s32[], f32[8]{0}, s32[]) tuple(%next, %x, %by)
}
"""
WHILE = """
%p = f32[8]{0} parameter(0)
%start = s32[] constant(FROM)
%step = s32[]{:T(128)} constant(BY)
%moved = s32[] copy(%step)
%init = (s32[], f32[8]{0}, s32[]) tuple(%start, %p, %moved)
%loop = (s32[], f32[8]{0}, s32[]) while(%init), condition=%less, body=%add
ROOT %x = f32[8]{0} get-tuple-element(%loop), index=1
"""


def trips(entry: str, *computations: str) -> int:
    found = module(entry, *computations)
    return Scope(found, found.entry).trips(found.entry.by_name["loop"])


@pytest.mark.parametrize(
    ("start", "step", "count"), [(0, 1, 48), (1, 1, 47), (0, 5, 10), (48, 1, 0), (-2, 25, 2)]
)
def test_loops_count_from_where_they_start_by_what_they_add(start, step, count):
    entry = WHILE.replace("FROM", str(start)).replace("BY", str(step))
    assert trips(entry, LESS, ADD) == count


def test_conditions_and_steps_may_be_fused_and_turned_round():
    condition = """
%greater (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %gt = pred[] compare(%b, %a), direction=GT
}

%less (s: (s32[], f32[8], s32[])) -> pred[] {
  %s = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %zero = s32[] constant(0)
  ROOT %f = pred[] fusion(%zero, %i), kind=kLoop, calls=%greater
}
"""
    body = """
%minus (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %d = s32[] subtract(%a, %one)
}

%add (s: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %s = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%minus
  ROOT %t = (s32[], f32[8]{0}, s32[]) tuple(%next, %x, %i)
}
"""
    assert trips(WHILE.replace("FROM", "16").replace("BY", "1"), condition, body) == 16


def test_a_constant_reaches_an_inner_loop_through_the_state_of_the_outer():
    outer = """
%outer (o: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %o = (s32[], f32[8]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%o), index=0
  %x = f32[8]{0} get-tuple-element(%o), index=1
  %kept = s32[] get-tuple-element(%o), index=2
  %zero = s32[] constant(0)
  %inner_init = (s32[], f32[8]{0}, s32[]) tuple(%zero, %x, %kept)
  %inner = (s32[], f32[8]{0}, s32[]) while(%inner_init), condition=%less, body=%add
  %y = f32[8]{0} get-tuple-element(%inner), index=1
  %next = s32[] add(%j, %kept)
  %copied = s32[] copy(%kept)
  ROOT %t = (s32[], f32[8]{0}, s32[]) tuple(%next, %y, %copied)
}
"""
    entry = WHILE.replace("FROM", "40").replace("BY", "4").replace("%add", "%outer")
    found = module(entry, LESS, ADD, outer)
    scope = Scope(found, found.entry)
    loop = found.entry.by_name["loop"]
    assert scope.trips(loop) == 2
    inside = scope.body(loop)
    assert inside.trips(inside.computation.by_name["inner"]) == 12


def test_a_loop_bounded_by_data_is_an_error_not_one():
    entry = WHILE.replace("constant(FROM)", "bitcast(%p)").replace("BY", "1")
    with pytest.raises(TripCountError, match=r"Loop loop in main .* depends on data"):
        trips(entry, LESS, ADD)
    with pytest.raises(TripCountError, match="does not end"):
        trips(WHILE.replace("FROM", "0").replace("BY", "0"), LESS, ADD)


# ---- FLOPs


def convolution(out: str, left: str, right: str, rest: str) -> float:
    found = module(
        f"""
        %a = {left}{{0}} parameter(0)
        %b = {right}{{0}} parameter(1)
        ROOT %c = {out}{{0}} convolution(%a, %b), {rest}
        """
    )
    return flops(found, "c")


def test_batched_dots_written_as_dilated_convolutions_count_valid_taps_only():
    found = convolution(
        "f32[320,32,80,80]",
        "bf16[320,80,32,128]",
        "bf16[320,80,32,128]",
        "window={size=320x32 stride=319x31 lhs_dilate=320x32}, dim_labels=0b1f_0o1i->01bf",
    )
    assert found == 2 * 320 * 32 * 80 * 80 * 128


def test_dots_over_two_axes_written_as_padded_reversed_convolutions():
    found = convolution(
        "bf16[320,99,25,128]",
        "bf16[320,99,3200,1]",
        "bf16[3200,25,128,1]",
        "window={size=1x25 pad=0_0x24_24 rhs_reversal=0x1}, dim_labels=b0f1_i1o0->b01f",
    )
    assert found == 2 * 320 * 99 * 25 * 128 * 3200


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("window={size=14x14 stride=14x14}, dim_labels=b01f_01io->b01f", 8 * 16 * 588 * 256),
        (
            "window={size=14x14 stride=14x14}, dim_labels=b01f_01io->b01f, feature_group_count=3",
            8 * 16 * 196 * 256,
        ),
    ],
)
def test_patch_embeddings(rest, expected):
    kernel = "bf16[14,14,1,256]" if "group" in rest else "bf16[14,14,3,256]"
    assert convolution("bf16[8,4,4,256]", "bf16[8,56,56,3]", kernel, rest) == 2 * expected


def test_taps_in_the_padding_cost_nothing():
    found = convolution(
        "f32[1,4,1]", "f32[1,4,1]", "f32[3,1,1]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
    )
    assert found == 2 * (3 * 4 - 2)


def test_matrix_work_is_found_in_fusions_of_fusions():
    found = module(
        """
        %a = f32[8,4]{1,0} parameter(0)
        ROOT %f = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%outer
        """,
        """
%inner (a: f32[8,4]) -> f32[8,8] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
""",
        """
%outer (a: f32[8,4]) -> f32[8,8] {
  %a = f32[8,4]{1,0} parameter(0)
  %d = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%inner
  ROOT %n = f32[8,8]{1,0} negate(%d)
}
""",
    )
    assert flops(found, "f") == 2 * 8 * 8 * 4
    assert hbm(found, "f") == 4 * (8 * 4 + 8 * 8)


# ---- bytes


def test_a_fusion_that_slices_a_stack_reads_one_layer():
    found = module(
        """
        %stack = f32[16,32,128]{2,1,0:T(8,128)} parameter(0)
        %i = s32[]{:T(128)S(6)} parameter(1)
        ROOT %f = f32[1,32,128]{2,1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%take
        """,
        """
%take (stack: f32[16,32,128], i: s32[]) -> f32[1,32,128] {
  %stack = f32[16,32,128]{2,1,0:T(8,128)} parameter(0)
  %view = f32[16,32,128]{2,1,0:T(8,128)} bitcast(%stack)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,32,128]{2,1,0:T(8,128)} dynamic-slice(%view, %i, %zero, %zero), dynamic_slice_sizes={1,32,128}
}
""",
    )
    assert hbm(found, "f") == 4 * 32 * 128  # the result stays in VMEM


def test_a_fusion_that_updates_a_stack_writes_one_layer():
    put = """
%put (stack: f32[16,32,128], x: bf16[1,32,128], i: s32[]) -> f32[16,32,128] {
  %stack = f32[16,32,128]{2,1,0:T(8,128)} parameter(0)
  %x = bf16[1,32,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %wide = f32[1,32,128]{2,1,0:T(8,128)} convert(%x)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %u = f32[16,32,128]{2,1,0:T(8,128)} dynamic-update-slice(BASE, %wide, %i, %zero, %zero)
  ROOT %b = f32[16,32,128]{2,1,0:T(8,128)} bitcast(%u)
}
"""
    entry = """
        %stack = f32[16,32,128]{2,1,0:T(8,128)} parameter(0)
        %x = bf16[1,32,128]{2,1,0:T(8,128)(2,1)} parameter(1)
        %i = s32[]{:T(128)S(6)} parameter(2)
        ROOT %f = f32[16,32,128]{2,1,0:T(8,128)} fusion(%stack, %x, %i), kind=kLoop, calls=%put
        """
    assert hbm(module(entry, put.replace("BASE", "%stack")), "f") == (2 + 4) * 32 * 128
    # An update of something made in the fusion writes all of it.
    made = put.replace("BASE", "%made").replace(
        "  %u =", "  %made = f32[16,32,128]{2,1,0:T(8,128)} negate(%stack)\n  %u ="
    )
    assert hbm(module(entry, made), "f") == (2 * 16 * 4 + 2) * 32 * 128


def test_a_view_through_a_nested_fusion_is_read_by_whoever_uses_it():
    found = module(
        """
        %a = bf16[64,1,128]{2,0,1} parameter(0)
        %b = bf16[128,256]{1,0} parameter(1)
        ROOT %f = bf16[64,256]{1,0} fusion(%a, %b), kind=kOutput, calls=%product
        """,
        """
%view (a: bf16[64,1,128]) -> bf16[64,128] {
  %a = bf16[64,1,128]{2,0,1} parameter(0)
  ROOT %v = bf16[64,128]{1,0} bitcast(%a)
}
""",
        """
%product (a: bf16[64,1,128], b: bf16[128,256]) -> bf16[64,256] {
  %a = bf16[64,1,128]{2,0,1} parameter(0)
  %v = bf16[64,128]{1,0} fusion(%a), kind=kLoop, calls=%view
  %b = bf16[128,256]{1,0} parameter(1)
  ROOT %c = bf16[64,256]{1,0} convolution(%v, %b), dim_labels=bf_io->bf
}
""",
    )
    assert flops(found, "f") == 2 * 64 * 128 * 256
    assert hbm(found, "f") == 2 * (64 * 128 + 128 * 256 + 64 * 256)


def test_gathers_and_scatters_touch_rows():
    found = module(
        """
        %table = f32[50000,128]{1,0:T(8,128)} parameter(0)
        %rows = s32[64]{0:T(128)} parameter(1)
        %g = f32[64,128]{1,0:T(8,128)} gather(%table, %rows), offset_dims={1}
        ROOT %s = f32[50000,128]{1,0:T(8,128)} scatter(%table, %rows, %g), to_apply=%sum
        """
    )
    index, row = 4 * 128, 4 * 64 * 128
    assert hbm(found, "g") == 2 * row + index
    assert hbm(found, "s") == 3 * row + index


def test_copies_count_the_side_that_is_in_memory():
    found = module(
        """
        %p = f32[64,128]{1,0:T(8,128)} parameter(0)
        %in = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
        %done = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%in)
        %out = (f32[64,128]{1,0:T(8,128)S(5)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
        %kept = f32[64,128]{1,0:T(8,128)S(5)} copy-done(%out)
        ROOT %c = f32[64,128]{0,1:T(8,128)} copy(%p)
        """
    )
    size = 4 * 64 * 128
    assert hbm(found, "in") == size
    assert hbm(found, "done") == 0
    out = traffic(found, found.entry, found.entry.by_name["out"])
    assert (out.hbm, out.host) == (size, size)
    assert found.entry.by_name["kept"].shapes[0].space == HOST
    assert hbm(found, "c") == size + 4 * 128 * 128  # 64 columns are padded to a tile


def test_elements_of_tuples_in_the_short_form_of_newer_compilers():
    """`%state#0` stands for a get-tuple-element that is not written out (libtpu 0.0.50 for 0.12)."""
    text = """HloModule step, is_scheduled=true, num_partitions=1

%condition (s: (s32[], (f32[4], bf16[8]))) -> pred[] {
  %s = (s32[], (f32[4]{0}, bf16[8]{0})) parameter(0)
  %n = s32[] constant(7)
  ROOT %again = pred[] compare(%s#0, %n), direction=LT
}

%body (state: (s32[], (f32[4], bf16[8]))) -> (s32[], (f32[4], bf16[8])) {
  %state = (s32[], (f32[4]{0}, bf16[8]{0})) parameter(0)
  %one = s32[] constant(1)
  %next = s32[] add(%state#0, %one)
  %copied = bf16[8]{0} copy(%state#1#1)
  %pair = (f32[4]{0}, bf16[8]{0}) tuple(%state#1#0, %copied)
  ROOT %new = (s32[], (f32[4]{0}, bf16[8]{0})) tuple(%next, %pair)
}

ENTRY %main (p: f32[4], q: bf16[8]) -> (s32[], (f32[4], bf16[8])) {
  %p = f32[4]{0} parameter(0)
  %q = bf16[8]{0} parameter(1)
  %zero = s32[] constant(0)
  %both = (f32[4]{0}, bf16[8]{0}) tuple(%p, %q)
  %start = (s32[], (f32[4]{0}, bf16[8]{0})) tuple(%zero, %both)
  ROOT %loop = (s32[], (f32[4]{0}, bf16[8]{0})) while(%start), condition=%condition, body=%body
}
"""
    module = parse(text)
    read = module.computation("body").by_name["state#1#1"]
    assert read.opcode == "get-tuple-element" and read.shapes[0].dims == (8,)
    (loop,) = (op for op in module.entry.ops if op.opcode == "while")
    assert Scope(module, module.entry).trips(loop) == 7
