"""The cost of small programs equals what is counted by hand, for programs of XLA's compilers for TPUs and GPUs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxclip.planning import hlo
from jaxclip.planning.cost import program_cost
from jaxclip.planning.memory import moved_bytes
from jaxclip.planning.network import device_groups
from jaxclip.runtime.hardware import CHIPS

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
programs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(programs)
LAYERS, ROWS, WIDTH, COLUMNS = programs.LAYERS, programs.ROWS, programs.WIDTH, programs.COLUMNS
PRODUCT = 2 * ROWS * WIDTH * COLUMNS
X, W, OUT = 2 * ROWS * WIDTH, 2 * WIDTH * COLUMNS, 2 * ROWS * COLUMNS  # bytes in bfloat16
LAYER = 2 * WIDTH * WIDTH
HEADS = 2 * 12  # of a device: 2 pictures of 12 heads
QUERIES = 2 * HEADS * 198 * 64  # bytes of the queries of attention, and of keys, values and results


def devices(kind: str) -> list[SimpleNamespace]:
    """Returns stand-ins for the 16 devices of v5e:4x4 or of two machines of h200, in the order of a mesh."""
    client = SimpleNamespace(runtime_type="compile_only_runtime")
    if kind == "tpu":
        return [SimpleNamespace(platform="tpu", coords=(i % 4, i // 4, 0), id=i, client=client) for i in range(16)]
    return [SimpleNamespace(platform="gpu", process_index=i // 8, id=i, client=client) for i in range(16)]


def cost_of(program: str):
    kind = program.partition("_")[0]
    chip = CHIPS["v5e" if kind == "tpu" else "h200"]
    return program_cost((PROGRAMS / f"{program}.hlo").read_text(), devices(kind), chip), chip


@pytest.mark.parametrize(
    ("program", "traffic", "flops"),
    [
        ("tpu_product", X + W + OUT, PRODUCT),
        ("gpu_product", X + W + OUT, PRODUCT),  # cuBLAS's workspace of 32 MiB does not count
        ("tpu_highest", 2 * (X + W + OUT), PRODUCT),
        # The carry stays in vector memory: it is read before the loop and written after it. Each iteration reads one
        # layer out of the stack, by a slice in a fusion inside of the product's fusion.
        ("tpu_scan", X + LAYERS * LAYER + X, LAYERS * 2 * ROWS * WIDTH * WIDTH),
        # A copy before the loop. Each iteration copies a layer, multiplies, and applies tanh.
        ("gpu_scan", 2 * X + LAYERS * (2 * LAYER + (X + LAYER + X) + 2 * X), LAYERS * 2 * ROWS * WIDTH * WIDTH),
        ("tpu_padded", 2 * 257 * 64 * 384 * 4, 0),  # laid out as (257, 64, 257), the last axis padded to 3 x 128
        # Copies into and out of vector memory, and 512 bytes of lengths that are not used.
        ("tpu_kernel", 4 * QUERIES + 512, 2 * 2 * HEADS * 198 * 198 * 64),
        ("gpu_attention", 4 * QUERIES, 2 * 2 * HEADS * 198 * 198 * 64),
        # Forward 2 products, backward 5. Forward writes the results and a float32 sum per query; backward reads q, k,
        # v, the gradient, the results and the sums, and writes three gradients.
        ("gpu_attention_gradient", (4 + 8) * QUERIES + 2 * 4 * HEADS * 198, 7 * 2 * HEADS * 198 * 198 * 64),
    ],
)
def test_traffic_and_flops_equal_a_count_by_hand(program, traffic, flops):
    cost, chip = cost_of(program)
    assert cost.traffic == traffic
    assert sum(cost.flops.values()) == flops
    assert cost.memory == traffic / chip.memory_bandwidth


@pytest.mark.parametrize(
    ("program", "rate"),
    [
        ("tpu_product", 197e12),
        ("tpu_highest", 197e12 / 6),  # a float32 product at the precision highest is six products in bfloat16
        ("gpu_product", 989e12),
        ("gpu_highest", 67e12),
    ],
)
def test_a_product_takes_the_time_of_its_type_and_precision(program, rate):
    assert cost_of(program)[0].compute == pytest.approx(PRODUCT / rate)


def test_a_permute_uses_one_link_and_an_all_gather_those_of_its_axes():
    block, whole = 64 * WIDTH * 4, 2 * ROWS * WIDTH
    ring, chip = cost_of("tpu_ring")
    assert ring.inside == {"collective-permute": 16 * block} and ring.network == 16 * block / chip.link
    gathered, _ = cost_of("tpu_gather")
    assert gathered.inside == {"all-gather": 7 / 8 * whole}
    # 8 of the 4 x 4 devices extend over both axes, neither of which is a ring: one link of each.
    assert gathered.network == pytest.approx(7 / 8 * whole / (2 * chip.link))
    assert gathered.traffic == whole / 8 + whole


def test_a_permute_without_pairs_sends_nothing():
    """The compiler for TPUs uses them to synchronise slices."""
    text = (PROGRAMS / "tpu_ring.hlo").read_text()
    text = re.sub(r"source_target_pairs=\{\{.*?\}\}", "source_target_pairs={}", text)
    cost = program_cost(text, devices("tpu"), CHIPS["v5e"])
    assert cost.network == 0 and not any(cost.inside.values()) and not any(cost.between.values())


def test_what_leaves_a_machine_of_eight_gpus_takes_the_network_between_machines():
    block = 64 * WIDTH * 4
    ring, chip = cost_of("gpu_ring")
    assert ring.inside == ring.between == {"collective-permute": 16 * block}  # of different devices
    assert ring.network == 16 * block / chip.between
    gathered, chip = cost_of("gpu_gather")
    assert gathered.inside == {"all-gather": 7 / 8 * 2 * ROWS * WIDTH} and not gathered.between["all-gather"]


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}, x", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_device_groups_are_read_from_every_notation(notation, groups):
    assert device_groups(notation, 8).tolist() == groups


HEADER = """
%inner (p: f32[512,512], q: f32[512,512]) -> f32[512,512] {
  %p = f32[512,512]{1,0} parameter(0)
  %q = f32[512,512]{1,0} parameter(1)
  ROOT %dot.1 = f32[512,512]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[512,512], b: f32[4096,512]) -> (f32[512,512], f32[65536,512]) {
  %a = f32[512,512]{1,0} parameter(0)
  %b = f32[4096,512]{1,0} parameter(1)
"""
GROUPS = "channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}"
SYNCHRONOUS = f"""
  %g = f32[65536,512]{{1,0}} all-gather(%b), {GROUPS}
  %f = f32[512,512]{{1,0}} fusion(%a, %a), kind=kOutput, calls=%inner
"""
OVERLAPPED = f"""
  %s = (f32[4096,512]{{1,0}}, f32[65536,512]{{1,0}}) all-gather-start(%b), {GROUPS}
  %f = f32[512,512]{{1,0}} fusion(%a, %a), kind=kOutput, calls=%inner
  %g = f32[65536,512]{{1,0}} all-gather-done(%s)
"""
NOTHING_BETWEEN = f"""
  %s = (f32[4096,512]{{1,0}}, f32[65536,512]{{1,0}}) all-gather-start(%b), {GROUPS}
  %g = f32[65536,512]{{1,0}} all-gather-done(%s)
  %f = f32[512,512]{{1,0}} fusion(%a, %a), kind=kOutput, calls=%inner
"""
FOOTER = "  ROOT %r = (f32[512,512]{1,0}, f32[65536,512]{1,0}) tuple(%f, %g)\n}\n"


def test_a_collective_is_hidden_only_by_work_between_its_start_and_its_end():
    chip = CHIPS["v5e"]
    marked = OVERLAPPED.replace(GROUPS, GROUPS + ', backend_config={"is_sync":true}')
    synchronous, overlapped, nothing_between, marked_synchronous = (
        program_cost(HEADER + body + FOOTER, devices("tpu"), chip)
        for body in (SYNCHRONOUS, OVERLAPPED, NOTHING_BETWEEN, marked)
    )
    work = max(2 * 512**3 / 197e12, 2 * 512 * 512 * 4 / chip.memory_bandwidth)
    assert synchronous.network == overlapped.network == nothing_between.network > work
    assert synchronous.exposed == nothing_between.exposed == marked_synchronous.exposed == synchronous.network
    assert overlapped.exposed == pytest.approx(overlapped.network - work)
    assert overlapped.traffic == synchronous.traffic


# Asynchronous slices as libtpu writes them: blocks are copied in and out while other instructions run.
ASYNCHRONOUS_SLICES = """
ENTRY %main (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %i = s32[]{:S(2)} constant(0)
  %s = ((f32[64,32]{1,0}, s32[], s32[]), f32[8,32]{1,0:S(1)}, s32[]{:S(2)}) dynamic-slice-start(%p, %i, %i)
  %d = f32[8,32]{1,0:S(1)} dynamic-slice-done(%s)
  %t = ((f32[64,32]{1,0}), f32[16,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:16], [0:32]}
  %e = f32[16,32]{1,0:S(1)} slice-done(%t)
  %u = ((f32[64,32]{1,0}, f32[8,32]{1,0:S(1)}, s32[], s32[]), f32[64,32]{1,0}, s32[]{:S(2)}) dynamic-update-slice-start(%p, %d, %i, %i)
  ROOT %v = f32[64,32]{1,0} dynamic-update-slice-done(%u)
}
"""  # noqa: E501


def test_an_asynchronous_slice_moves_only_the_slice():
    program = hlo.parse(ASYNCHRONOUS_SLICES)
    assert sum(moved_bytes(i, program) * times for i, times in program.executed()) == (8 + 16 + 8) * 32 * 4


# What a program of several TPU slices hands to its host: the sums of this slice, for those of the other ones.
BETWEEN_SLICES = """
ENTRY %main (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %token = token[] after-all()
  %s = (f32[64,128]{1,0}, u32[], token[]) send(%p, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="a_0",_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="KIND"}
  %r = (f32[64,128]{1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="a_0",_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="KIND"}
  %w = f32[64,128]{1,0} copy(%p)
  %e = token[] send-done(%s), channel_id=3, is_host_transfer=true
  %d = (f32[64,128]{1,0}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true
  ROOT %v = f32[64,128]{1,0} get-tuple-element(%d), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("kind", "name", "share"),
    [
        ("ALL_REDUCE", "all-reduce", 2 * 3 / 4),
        ("ALL_GATHER", "all-gather", 3),
        ("REDUCE_SCATTER", "reduce-scatter", 3 / 4),
        ("ONE_TO_ONE", "collective-permute", 1),
    ],
)
def test_sends_to_other_slices_take_the_network_of_the_data_centre(kind, name, share):
    found = devices("tpu")
    for device in found:
        device.slice_index = device.id // 4
    size, chip = 64 * 128 * 4, CHIPS["v5e"]
    cost = program_cost(BETWEEN_SLICES.replace("KIND", kind), found, chip)
    assert cost.between == {name: share * size} and not cost.inside[name]
    assert cost.network == pytest.approx(share * size / chip.between)
    assert cost.exposed == pytest.approx(cost.network - 2 * size / chip.memory_bandwidth)  # the copy overlaps
    assert cost.traffic == 4 * size  # sent, received, copied


CONVOLUTION = """
ENTRY %main (x: bf16[2,8,8,3], k: bf16[3,3,3,16]) -> bf16[2,8,8,16] {
  %x = bf16[2,8,8,3]{3,2,1,0} parameter(0)
  %k = bf16[3,3,3,16]{3,2,1,0} parameter(1)
  ROOT %c = bf16[2,8,8,16]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}
"""
BATCHED_PRODUCT = """
ENTRY %main (q: bf16[6,77,64], k: bf16[6,77,64]) -> bf16[6,77,77] {
  %q = bf16[6,77,64]{2,1,0} parameter(0)
  %k = bf16[6,77,64]{2,1,0} parameter(1)
  ROOT %c = bf16[6,77,77]{2,1,0} convolution(%q, %k), window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0oi->0bf
}
"""


@pytest.mark.parametrize(
    ("text", "flops"),
    [
        (CONVOLUTION, 2 * 2 * (3 * 8 - 2) ** 2 * 3 * 16),  # at each edge, one position of the window is padding
        (BATCHED_PRODUCT, 2 * 6 * 77 * 77 * 64),  # of each window of 6 positions, one meets an element
    ],
)
def test_a_convolution_counts_only_the_elements_that_its_window_meets(text, flops):
    assert program_cost(text, devices("tpu"), CHIPS["v5e"]).flops == {("bfloat16", "default"): flops}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[256,16,257,257]{2,3,1,0:T(8,128)}", 256 * 16 * 264 * 384 * 4),
        ("bf16[12,768]{1,0:T(8,128)(2,1)}", 16 * 768 * 2),
        ("bf16[1000]{0:T(1024)(128)(2,1)}", 1024 * 2),
        ("pred[3,5]{1,0}", 15),
        ("s4[8]{0}", 4),
    ],
)
def test_an_array_takes_whole_tiles(shape, size):
    (array,) = hlo.arrays(shape)
    assert array.bytes == size and array.main


def test_an_array_in_vector_memory_or_of_an_unknown_type_is_recognised():
    (array,) = hlo.arrays("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}")
    assert not array.main
    with pytest.raises(ValueError, match="unknown type, q7"):
        list(hlo.arrays("q7[8]{0}"))


# The counter of a loop without XLA's own count, the update of one row in place, and a conditional.
LOOP = """
%update (p: f32[64,32], i: s32[], row: f32[1,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,32]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[64,32]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}

%body (s: (s32[], f32[64,32], f32[1,32])) -> (s32[], f32[64,32], f32[1,32]) {
  %s = (s32[], f32[64,32]{1,0}, f32[1,32]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = f32[64,32]{1,0} get-tuple-element(%s), index=1
  %y = f32[1,32]{1,0} get-tuple-element(%s), index=2
  %f = f32[64,32]{1,0} fusion(%x, %n, %y), kind=kLoop, calls=%update
  %step = s32[] constant(STEP)
  %m = s32[] add(%n, %step)
  ROOT %t = (s32[], f32[64,32]{1,0}, f32[1,32]{1,0}) tuple(%m, %f, %y)
}

%condition (c: (s32[], f32[64,32], f32[1,32])) -> pred[] {
  %c = (s32[], f32[64,32]{1,0}, f32[1,32]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %lt = pred[] compare(%k, %limit), direction=DIRECTION
}

ENTRY %main (a: f32[64,32], b: f32[1,32]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[1,32]{1,0} parameter(1)
  %start = s32[] constant(3)
  %init = (s32[], f32[64,32]{1,0}, f32[1,32]{1,0}) tuple(%start, %a, %b)
  %w = (s32[], f32[64,32]{1,0}, f32[1,32]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[64,32]{1,0} get-tuple-element(%w), index=1
}
"""


def loop(limit, step, direction="LT"):
    return hlo.parse(LOOP.replace("LIMIT", str(limit)).replace("STEP", str(step)).replace("DIRECTION", direction))


@pytest.mark.parametrize(("limit", "step", "runs"), [(10, 1, 7), (11, 2, 4), (10, 2, 4)])
def test_a_loop_runs_from_start_to_limit_by_its_step_and_an_update_in_place_moves_one_row(limit, step, runs):
    program = loop(limit, step)
    moved = sum(moved_bytes(instruction, program) * times for instruction, times in program.executed())
    assert moved == runs * 2 * 32 * 4


def test_a_loop_of_unknown_length_is_an_error():
    program = loop(10, 1, "NE")
    with pytest.raises(ValueError, match="cannot tell how often the loop w runs"):
        list(program.executed())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_the_stored_programs_are_those_that_the_compiler_makes(kind, tmp_path):
    """Costs are compared, because names and order may differ between versions."""
    pytest.importorskip("libtpu" if kind == "tpu" else "jax_plugins.xla_cuda13")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("programs.py")), kind, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for stored in PROGRAMS.glob(f"{kind}_*.hlo"):
        new = program_cost(
            (tmp_path / stored.name).read_text(), devices(kind), CHIPS["v5e" if kind == "tpu" else "h200"]
        )
        old, _ = cost_of(stored.stem)
        assert new.flops == old.flops and new.traffic == pytest.approx(old.traffic, rel=0.03), stored.stem
        assert new.network == old.network, stored.stem
