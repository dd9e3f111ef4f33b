"""What is executed, hidden and exposed, on small texts and on dumps of the real compiler."""

# ruff: noqa: E501 (a line of HLO is as long as it is)

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from internvl_jax.plan.collectives import groups, transfer
from internvl_jax.plan.hlo import HloError, parse
from internvl_jax.plan.kernels import kernel_flops
from internvl_jax.plan.roofline import Rates, roofline

# 1 FLOP/s and byte/s: a second is a FLOP or a byte.
UNIT = Rates(flops=1.0, hbm=1e30, ici=1.0, dcn=0.1)
SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""


def module(entry: str, *computations: str, devices: int = 8):
    body = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return parse(
        f"HloModule step, is_scheduled=true, num_partitions={devices}\n\n{SUM}\n"
        + "\n".join(text.strip() + "\n" for text in computations)
        + f"\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    )


def product(name: str, flops: int) -> str:
    """A line of so many FLOPs."""
    return (
        f"%{name} = f32[{flops // 2},1]{{1,0}} dot(%u{flops // 2}, %one), "
        "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    )


PARAMETERS = """
%x = f32[16,1]{1,0} parameter(0)
%one = f32[1,1]{1,0} parameter(1)
%u5 = f32[5,1]{1,0} parameter(2)
%u15 = f32[15,1]{1,0} parameter(3)
%u50 = f32[50,1]{1,0} parameter(4)
"""
ALL = "replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true"


def only(report):
    (found,) = report.collectives
    return found


# ---- who exchanges with whom


def members(text: str, devices: int = 8) -> list[list[int]]:
    found = module(
        f"%x = f32[8]{{0}} parameter(0)\nROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, "
        f"{text}, use_global_device_ids=true, to_apply=%sum",
        devices=devices,
    )
    return groups(found.entry.root, devices)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['r'=2,'f'=4] {'f'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['r'=2,'f'=4] {'r'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['r'=2,'f'=4] {'r','f'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (
            "replica_groups=mesh['r'=2,'f'=4] {'f':(2)2}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("source_target_pairs={{0,1},{1,0},{2,2}}", [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups_in_every_notation(text, expected):
    assert members(text) == expected


def test_replica_groups_in_an_unknown_notation_are_an_error():
    with pytest.raises(HloError, match="cannot be read"):
        members("replica_groups=@somewhere")


def test_traffic_between_slices_is_shared_by_the_devices_of_a_slice():
    def between(text: str, devices_per_slice: int):
        found = module(
            f"%x = f32[25]{{0}} parameter(0)\nROOT %r = f32[25]{{0}} all-reduce(%x), channel_id=1,"
            f" replica_groups={text}, use_global_device_ids=true, to_apply=%sum"
        )
        return transfer(found.entry, found.entry.root, 8, devices_per_slice)

    inside = between("[2,4]<=[8]", 4)
    assert (inside.network, inside.within, inside.slices, inside.bytes) == ("ici", 4, 1, 100)
    assert inside.seconds(ici=10.0, dcn=1.0) == 2 * 100 / 10
    across = between("[4,2]<=[2,4]T(1,0)", 4)
    assert (across.network, across.within, across.slices) == ("dcn", 1, 2)
    assert across.seconds(ici=10.0, dcn=1.0) == 2 * 100 / 1
    both = between("[1,8]<=[8]", 4)
    assert (both.network, both.within, both.slices) == ("dcn", 4, 2)
    assert both.seconds(ici=10.0, dcn=1.0) == 2 * 100 / 10 + 2 * 100 / 4


# ---- bytes and time of collectives


@pytest.mark.parametrize(
    ("line", "kind", "size", "factor"),
    [
        (f"f32[128,1]{{1,0}} all-gather(%x), channel_id=1, {ALL}", "all-gather", 512, 1),
        (f"f32[2,1]{{1,0}} reduce-scatter(%x), channel_id=1, {ALL}", "reduce-scatter", 64, 1),
        (f"f32[16,1]{{1,0}} all-reduce(%x), channel_id=1, {ALL}", "all-reduce", 64, 2),
        (f"f32[16,1]{{1,0}} all-to-all(%x), channel_id=1, {ALL}", "all-to-all", 64, 1),
        (
            "f32[16,1]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            64,
            1,
        ),
        (
            f"(f32[16,1]{{1,0}}, f32[1,1]{{1,0}}) all-reduce(%x, %one), channel_id=1, {ALL}",
            "all-reduce",
            68,
            2,
        ),
    ],
)
def test_synchronous_collectives_are_exposed_whatever_surrounds_them(line, kind, size, factor):
    found = roofline(module(f"{PARAMETERS}\nROOT %c = {line}\n{product('after', 100)}"), UNIT)
    moved = only(found)
    assert (moved.kind, moved.asynchronous, moved.network) == (kind, False, "ici")
    assert (moved.count, moved.bytes) == (1, size)
    # `within` is half the pairs of a permutation: still one link
    assert moved.seconds == moved.exposed == factor * size
    assert found.step_s == 100 + factor * size


def test_work_between_start_and_done_hides_a_collective():
    found = roofline(
        module(
            f"""{PARAMETERS}
            {product("before", 100)}
            %s = (f32[16,1]{{1,0}}, f32[128,1]{{1,0}}) all-gather-start(%x), channel_id=1, {ALL}
            {product("beside", 30)}
            %d = f32[128,1]{{1,0}} all-gather-done(%s)
            ROOT {product("after", 100)}
            """
        ),
        UNIT,
    )
    moved = only(found)
    assert (moved.asynchronous, moved.bytes, moved.seconds) == (True, 512, 512)
    assert moved.exposed == 512 - 30


def test_work_hides_one_collective_only():
    start = "%s{0} = (f32[5,1]{{1,0}}, f32[5,1]{{1,0}}) collective-permute-start(%u5), {1}"
    pairs = "source_target_pairs={{0,1},{1,0}}"
    found = roofline(
        module(
            f"""{PARAMETERS}
            {start.format(1, pairs)}
            {start.format(2, pairs)}
            {product("beside", 30)}
            %d1 = f32[5,1]{{1,0}} collective-permute-done(%s1)
            ROOT %d2 = f32[5,1]{{1,0}} collective-permute-done(%s2)
            """
        ),
        UNIT,
    )
    moved = only(found)
    assert (moved.count, moved.seconds) == (2, 40)  # 20 bytes each, 30 FLOPs beside them
    assert moved.exposed == 10


def test_a_start_without_operands_waits_for_the_update_that_brings_them():
    wrapped = f"""
%offloaded (a: f32[16,1]) -> f32[128,1] {{
  %a = f32[16,1]{{1,0}} parameter(0)
  ROOT %g = f32[128,1]{{1,0}} all-gather(%a), channel_id=1, {ALL}
}}

%thread (a: f32[16,1]) -> f32[128,1] {{
  %a = f32[16,1]{{1,0}} parameter(0)
  ROOT %c = f32[128,1]{{1,0}} custom-call(%a), custom_call_target="x", called_computations={{%offloaded}}
}}
"""
    found = roofline(
        module(
            f"""{PARAMETERS}
            %s = ((), (), (s32[9]{{0}})) async-start(), async_execution_thread="sparsecore", calls=%thread
            {product("early", 100)}
            %u = ((f32[16,1]{{1,0}}), f32[128,1]{{1,0}}, (s32[9]{{0}})) async-update(%s, %x)
            {product("beside", 30)}
            ROOT %d = f32[128,1]{{1,0}} async-done(%u)
            """,
            wrapped,
        ),
        UNIT,
    )
    moved = only(found)
    assert (moved.kind, moved.asynchronous, moved.count, moved.bytes) == (
        "all-gather",
        True,
        1,
        512,
    )
    assert moved.exposed == 512 - 30


def test_of_a_conditional_the_longest_branch_counts_and_loops_multiply_it():
    branches = f"""
%long (x: f32[15,1]) -> f32[15,1] {{
  %u15 = f32[15,1]{{1,0}} parameter(0)
  %one = f32[1,1]{{1,0}} constant({{ {{1}} }})
  ROOT {product("d", 30)}
}}

%short (x: f32[15,1]) -> f32[15,1] {{
  ROOT %x = f32[15,1]{{1,0}} parameter(0)
}}

%body (s: (s32[], f32[15,1])) -> (s32[], f32[15,1]) {{
  %s = (s32[], f32[15,1]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[15,1]{{1,0}} get-tuple-element(%s), index=1
  %c = f32[15,1]{{1,0}} conditional(%i, %x, %x), branch_computations={{%short, %long}}
  %by = s32[] constant(1)
  %n = s32[] add(%i, %by)
  ROOT %t = (s32[], f32[15,1]{{1,0}}) tuple(%n, %c)
}}

%until (s: (s32[], f32[15,1])) -> pred[] {{
  %s = (s32[], f32[15,1]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(40)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}
"""
    found = roofline(
        module(
            f"""{PARAMETERS}
            %zero = s32[] constant(0)
            %init = (s32[], f32[15,1]{{1,0}}) tuple(%zero, %u15)
            ROOT %w = (s32[], f32[15,1]{{1,0}}) while(%init), condition=%until, body=%body
            """,
            branches,
        ),
        UNIT,
    )
    assert found.flops == 40 * 30
    assert [(op.name, op.trips) for op in found.executed if op.flops] == [("d", 40)]


def test_kernels_cost_what_the_caller_says():
    text = f"""{PARAMETERS}
        %splash_fwd.7 = f32[16,1]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call"
        ROOT %other = f32[16,1]{{1,0}} custom-call(%splash_fwd.7), custom_call_target="tpu_custom_call"
        """
    silent = roofline(module(text), UNIT)
    assert silent.kernels == {"splash_fwd": 1, "other": 1}
    assert (silent.flops, silent.kernel_flops["splash_fwd"]) == (0, 0)
    told = roofline(module(text), UNIT, {"splash_fwd": 70.0})
    assert (told.flops, told.kernel_flops) == (0, {"splash_fwd": 70.0, "other": 0.0})
    assert told.by_kind["kernel"] == pytest.approx(70)
    by_shape = roofline(module(text), UNIT, lambda name, op: float(op.shapes[0].dims[0]))
    assert by_shape.kernel_flops == {"splash_fwd": 16.0, "other": 16.0}


# ---- the real compiler's texts


def dump(name: str):
    path = Path(__file__).with_name("dumps") / f"{name}.txt.gz"
    return parse(gzip.decompress(path.read_bytes()).decode())


V5E = Rates(flops=197e12, hbm=819e9, ici=90e9)
V5P = Rates(flops=459e12, hbm=2765e9, ici=270e9)
# Six layers of two products, rows of one device [2048, 1024], weights [1024, 4096], 4 devices.
LAYER = 2 * 2 * 2048 * 1024 * 4096


def test_gathers_spread_over_fusions_are_one_collective_hidden_by_their_work():
    found = roofline(dump("v5e_fsdp"), V5E)
    # Forward, its first product again, and two gradients of each.
    assert found.flops == 6 * LAYER * (1 + 0.5 + 2)
    gathers = {c.asynchronous: c for c in found.collectives if c.kind == "all-gather"}
    assert gathers[True].count == gathers[False].count == 12
    assert gathers[True].bytes == 12 * 2 * 1024 * 4096
    assert gathers[False].exposed == gathers[False].seconds
    assert gathers[True].exposed < 0.05 * gathers[True].seconds
    (scattered,) = (c for c in found.collectives if c.kind == "reduce-scatter")
    padded = 2 * (1152 * 4096 + 4224 * 1024)  # rings in both directions: rows padded
    assert (scattered.count, scattered.bytes) == (12, 6 * padded)
    assert not [c for c in found.collectives if c.kind == "all-reduce"]


def test_offloaded_collectives_start_once_their_operand_is_there():
    found = roofline(dump("v5p_sparse_core"), V5P)
    (moved,) = found.collectives
    assert (moved.kind, moved.asynchronous, moved.count) == ("all-reduce", True, 36)
    assert moved.bytes == 36 * 2 * 4096 * 16384
    assert 0 < moved.exposed < 0.5 * moved.seconds


def test_offloaded_activations_are_host_copies():
    found = roofline(dump("v5e_offload"), V5E)
    assert found.host_copies == 2 * 6 * 2 * 2048 * 1024
    # A loop of which one iteration was peeled off, with a branch in it: 41 products.
    assert found.flops == 41 * 2 * 2048 * 1024 * 1024


def test_kernels_of_a_real_text_are_found():
    found = roofline(dump("v5p_kernel"), V5P)
    assert found.kernels == {"splash_mha_fwd_residuals": 1, "splash_mha_dq_no_residuals": 1}
    assert found.flops == 2 * 2 * 4 * 512 * 128 * 128  # the product after them


def test_sources_of_a_real_text():
    lines = roofline(dump("v5e_fsdp"), V5E).top()
    assert any(line.kind == "matmul" and "a.py:" in line.code for line in lines)
    assert any(line.op_name.startswith("all-gather: jit") for line in lines)


def test_a_collective_between_slices_is_a_send_and_a_receive():
    """As the compiler writes it for several slices: 200 bytes summed, at a tenth of a byte/s."""
    meets = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.7_0",_xla_megascale_reduce_operation="SUM",'
        '_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    entry = f"""{PARAMETERS}
%after = token[] after-all()
%sent = (f32[50,1]{{1,0}}, u32[], token[]) send(%u50, %after), channel_id=6, is_host_transfer=true, {meets}
%got = (f32[50,1]{{1,0}}, u32[], token[]) recv(%after), channel_id=5, is_host_transfer=true, {meets}
{product("work", 100)}
%got-done = (f32[50,1]{{1,0}}, token[]) recv-done(%got), channel_id=5, is_host_transfer=true
ROOT %r = f32[50,1]{{1,0}} get-tuple-element(%got-done), index=0
"""
    found = only(roofline(module(entry), UNIT))
    assert (found.kind, found.network, found.asynchronous) == ("all-reduce", "dcn", True)
    assert (found.count, found.bytes) == (1, 200)
    assert found.seconds == pytest.approx(2 * 200 / 0.1)
    assert found.exposed == pytest.approx(2 * 200 / 0.1 - 100)


def test_flops_of_splash_kernels_are_read_off_their_arrays():
    """Causal, 4 x 4 blocks of 128 of which 10 are computed; forward, and the gradient of q."""
    found = roofline(dump("v5p_kernel"), V5P, kernel_flops)
    product = 2 * 2 * 4 * 512 * 512 * 128 * 10 / 16
    assert found.kernel_flops == {
        "splash_mha_fwd_residuals": 2 * product,
        "splash_mha_dq_no_residuals": 3 * product,
    }
    assert found.flops == 2 * 2 * 4 * 512 * 128 * 128


def test_one_splash_kernel_for_all_gradients_and_kernels_that_say_what_they_do():
    text = f"""{PARAMETERS}
        %splash_mha_dkv_no_residuals.1 = (bf16[2,1,3,640,128]{{4,3,2,1,0}}, bf16[2,3,640,128]{{3,2,1,0}}) custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={{bf16[2,3,640,128]{{3,2,1,0}}, bf16[2,3,640,128]{{3,2,1,0}}}}
        %own.2 = f32[16,1]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{"cost_estimate":{{"bytes_accessed":"7","flops":"123"}}}}}}
        ROOT %other = f32[16,1]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call"
        """
    assert roofline(module(text), UNIT, kernel_flops).kernel_flops == {
        "splash_mha_dkv_no_residuals": 5 * 2 * 2 * 3 * 640 * 640 * 128,
        "own": 123,
        "other": 0,
    }
