"""Compiling for pods: the reading of compiled programs, the roofline, and the command."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revseg_jax.cli import main
from revseg_jax.compilation.hlo import Array, parse
from revseg_jax.compilation.programs import PROGRAMS, make_programs
from revseg_jax.compilation.roofline import CHIPS, Pod, estimate
from revseg_jax.compilation.topologies import describe
from revseg_jax.compilation.work import Work, program_work
from revseg_jax.compile import Compiled, step_seconds, table, too_large
from revseg_jax.config import load_config
from revseg_jax.errors import InputError
from revseg_jax.learner.flops import forward_flops
from revseg_jax.parallel.sharding import make_placement
from revseg_jax.parallel.startup import CUDA_PLUGINS
from revseg_jax.policy.config import PUBLISHED

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("optimised")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu")
needs_cuda = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, CUDA_PLUGINS)), reason="compiling for GPUs needs JAX's CUDA plugin"
)


def work_of(function, *shapes, trips=1):
    text = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()
    return program_work(parse(text), trips)


def test_scanned_layers_count_as_often_as_they_run():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    work = work_of(layers, (32, 64), (28, 64, 64))
    assert sum(w.flops * w.times for w in work) == 28 * 2 * 32 * 64 * 64
    # A layer reads its own kernel, some of it more than once on a CPU, but not the stack of all 28.
    kernels = 28 * 64 * 64 * 4
    assert kernels <= sum(w.bytes * w.times for w in work) < 8 * kernels


def test_loops_of_unknown_length_take_the_given_one_and_conditionals_their_dearer_branch():
    def loop(x, kernel):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.sin(x @ kernel), x)

    assert sum(w.flops * w.times for w in work_of(loop, (8, 16), (16, 16), trips=11)) == 11 * 2 * 8 * 16 * 16

    def choice(x, kernel):
        return jax.lax.cond(x.sum() < 9, lambda: jnp.sin(x @ kernel @ kernel), lambda: x @ kernel)

    assert sum(w.flops * w.times for w in work_of(choice, (8, 16), (16, 16))) == 2 * 2 * 8 * 16 * 16


POD_PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.1: bf16[28,512,256], param_1.1: s32[], param_2.1: bf16[128,512]) -> bf16[128,256] {
  %param_0.1 = bf16[28,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)S(6)} parameter(1)
  %param_2.1 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %constant.1 = s32[]{:T(128)} constant(0)
  %dynamic-slice.1 = bf16[1,512,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.1, %constant.1, %constant.1), dynamic_slice_sizes={1,512,256}
  %bitcast.1 = bf16[512,256]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.1)
  ROOT %convolution.1 = bf16[128,256]{1,0:T(8,128)(2,1)} convolution(%param_2.1, %bitcast.1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/while/body/dot_general"}
}

%body.1 (arg: (s32[], bf16[28,512,256], bf16[128,512])) -> (s32[], bf16[28,512,256], bf16[128,512]) {
  %arg = (s32[]{:T(128)}, bf16[28,512,256]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[128,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %get-tuple-element.2 = bf16[28,512,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %get-tuple-element.3 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=2
  %splash.1 = f32[256,128]{1,0:T(8,128)} custom-call(%get-tuple-element.2), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(step)/while/body/splash_mha_fwd"}
  %fusion.1 = bf16[128,256]{1,0:T(8,128)(2,1)} fusion(%get-tuple-element.2, %get-tuple-element.1, %get-tuple-element.3), kind=kOutput, calls=%fused_computation.1, metadata={op_name="jit(step)/while/body/dot_general"}
  %all-gather.1 = bf16[128,512]{1,0:T(8,128)(2,1)} all-gather(%fusion.1), channel_id=1, replica_groups=[32,2]<=[2,32]T(1,0), dimensions={1}, use_global_device_ids=true
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[28,512,256]{2,1,0:T(8,128)(2,1)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%get-tuple-element.1, %get-tuple-element.2, %all-gather.1)
}

%condition.1 (arg.1: (s32[], bf16[28,512,256], bf16[128,512])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[28,512,256]{2,1,0:T(8,128)(2,1)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  ROOT %constant.2 = pred[]{:T(512)} constant(true)
}

%all-reduce-scatter.1 (input: f32[64,128]) -> f32[1,128] {
  %input = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,128]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.2 = f32[1,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={1,128}
}

ENTRY %main.1_spmd (p0: (s32[], bf16[28,512,256], bf16[128,512]), p1: f32[64,128], p2: bf16[8,16,32], p3: bf16[8,32,64]) -> f32[1,128] {
  %p0 = (s32[]{:T(128)}, bf16[28,512,256]{2,1,0:T(8,128)(2,1)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %p1 = f32[64,128]{1,0:T(8,128)} parameter(1)
  %p2 = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} parameter(2)
  %p3 = bf16[8,32,64]{2,1,0:T(8,128)(2,1)} parameter(3)
  %while.1 = (s32[]{:T(128)}, bf16[28,512,256]{2,1,0:T(8,128)(2,1)}, bf16[128,512]{1,0:T(8,128)(2,1)S(1)}) while(%p0), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"28"},"flag_configs":[]}
  %convolution.2 = bf16[8,16,64]{2,1,0:T(8,128)(2,1)} convolution(%p2, %p3), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf
  ROOT %fusion.2 = f32[1,128]{1,0:T(8,128)} fusion(%p1), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_a_pod_program_is_read_as_it_runs():
    """Layers of a stack, batched products as TPUs write them, memories of the core, groups, fused reduce-scatters,
    kernels with attributes of several lines and what follows them."""
    works = program_work(parse(POD_PROGRAM))
    by_kind = {kind: [w for w in works if w.kind == kind] for kind in {w.kind for w in works}}
    layer, batched = by_kind["compute"]
    assert (layer.flops, layer.times) == (2 * 128 * 512 * 256, 28)
    assert layer.bytes == 512 * 256 * 2 + 4 + 128 * 256 * 2  # a layer, its number, the result; the input is not in HBM
    assert batched.flops == 8 * 2 * 16 * 32 * 64
    (kernel,) = by_kind["kernel"]
    assert (kernel.source, kernel.times) == ("jit(step)/while/body/splash_mha_fwd", 28)
    assert kernel.bytes == 28 * 512 * 256 * 2 + 256 * 128 * 4
    (gather,) = by_kind["all-gather"]
    assert (gather.bytes, gather.times, gather.group) == (128 * 512 * 2, 28, (0, 32))
    (scatter,) = by_kind["reduce-scatter"]
    assert (scatter.bytes, scatter.group) == (64 * 128 * 4, (0, 1, 2, 3))


# Each device holds a power of two; the sum that the first device gets has the bits of its group's members.
GROUPS = """
import itertools, json
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from revseg_jax.compilation.collectives import COLLECTIVES
from revseg_jax.compilation.hlo import parse
from revseg_jax.compilation.work import program_work

mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
powers, found = 2.0 ** np.arange(8).reshape(2, 2, 2), []
for order in itertools.permutations("abc"):
    x = powers.transpose(["abc".index(name) for name in order])
    spread = NamedSharding(mesh, PartitionSpec(*order))
    for count in (1, 2, 3):
        for axes in itertools.combinations(range(3), count):
            out = NamedSharding(mesh, PartitionSpec(*(order[axis] for axis in range(3) if axis not in axes)))
            program = jax.jit(lambda x: x.sum(axes), in_shardings=spread, out_shardings=out).lower(x).compile()
            total = int(program(jax.device_put(x, spread)).addressable_shards[0].data.ravel()[0])
            text = program.as_text()
            groups = [work.group for work in program_work(parse(text)) if work.kind in COLLECTIVES]
            found += [(total, group, text) for group in groups if len(groups) == 1]  # some sum one axis after another
print(json.dumps(found))
"""


def test_groups_are_those_that_a_program_sums_over():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", GROUPS], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [sum(1 << partition for partition in group) for _, group, _ in found] == [total for total, _, _ in found]
    assert all(any(form in text for *_, text in found) for form in ("=mesh['axis_0'", "device_ids=(["))


def collective_of(line):
    (work,) = program_work(
        parse(f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  %p = f32[4]{{0}} parameter(0)\n  {line}\n}}")
    )
    return work


def test_collectives_of_several_arrays_count_all_of_them():
    """As GPU programs start them: what goes in, then what comes out, each in brackets where there are several."""
    several = "%s = ((bf16[1,8]{1,0}, f32[4]{0}), (bf16[8,8]{1,0}, f32[32]{0})) all-gather-start(%p, %p)"
    mesh = ", replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={0}"
    work = collective_of(several + mesh)
    assert (work.kind, work.bytes, work.group) == ("all-gather", 8 * 8 * 2 + 32 * 4, tuple(range(8)))
    scattered = "%s = ((bf16[8,8]{1,0}, f32[32]{0}), (bf16[1,8]{1,0}, f32[4]{0})) reduce-scatter-start(%p, %p)"
    work = collective_of(scattered + mesh)
    assert (work.kind, work.bytes) == ("reduce-scatter", 8 * 8 * 2 + 32 * 4)
    assert collective_of("%s = f32[2]{0} reduce-scatter(%p), replica_groups={}").bytes == 4 * 4
    assert collective_of("%s = (f32[4]{0}, f32[8]{0}) all-reduce-start(%p, %p), replica_groups={}").bytes == 12 * 4
    permuted = (
        "%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}"
    )
    assert (collective_of(permuted).bytes, collective_of(permuted).group) == (16, (0, 1))


def test_groups_along_a_part_of_an_axis():
    line = "%s = f32[4]{0} all-reduce(%p), replica_groups=mesh['a'=2,'b'=8] "
    assert collective_of(line + "{'b':(2)2}").group == (0, 2)
    assert collective_of(line + "{'a','b':(4)2}").group == (0, 1, 8, 9)
    with pytest.raises(ValueError, match="unknown replica groups: something"):
        collective_of("%s = f32[4]{0} all-reduce(%p), replica_groups=something new")


def test_the_roofline_takes_the_slower_of_arithmetic_and_memory():
    pod = Pod("v5p:4x4x4", CHIPS["v5p"], 459e12, tuple(np.ndindex(4, 4, 4)), 1)
    found = estimate(program_work(parse(POD_PROGRAM)), pod, lambda work: 0.0)
    kernel = (28 * 512 * 256 * 2 + 256 * 128 * 4) / 2765e9
    layer = max(2 * 128 * 512 * 256 / 459e12, (512 * 256 + 2 + 128 * 256) * 2 / 2765e9)
    batched = max(8 * 2 * 16 * 32 * 64 / 459e12, 8 * (16 * 32 + 32 * 64 + 16 * 64) * 2 / 2765e9)
    assert found.compute_seconds == pytest.approx(28 * (kernel + layer) + batched)
    assert found.collective_bytes == {"all-gather": 28 * 128 * 512 * 2, "reduce-scatter": 64 * 128 * 4}
    # Half of the array comes from the other of two neighbours, by one link; four fill a ring, in both directions.
    assert found.collective_seconds == pytest.approx(28 * 65536 / 9e10 + 64 * 128 * 4 * 3 / 4 / (2 * 9e10))
    assert found.seconds == max(found.compute_seconds, found.collective_seconds)


def test_larger_groups_use_more_axes_and_other_slices_the_network():
    pod = Pod("v5p:4x4x4", CHIPS["v5p"], 459e12, tuple(np.ndindex(4, 4, 4)) * 2, 2)
    size = 1e9
    within = pod.collective_seconds("all-gather", size, tuple(range(64)))
    assert within == pytest.approx(size * 63 / 64 / (3 * 2 * 9e10))
    assert pod.collective_seconds("all-reduce", size, tuple(range(64))) == pytest.approx(2 * within)
    assert pod.collective_seconds("all-gather", size, (0, 64)) == pytest.approx(size / 2 / 6.25e9)
    open_ended = Pod("v5e:4x4", CHIPS["v5e"], 197e12, tuple(np.ndindex(4, 4)), 1)  # 4 in a row close to no ring
    assert open_ended.collective_seconds("all-gather", size, (0, 1, 2, 3)) == pytest.approx(size * 3 / 4 / 4.5e10)
    no_cube = Pod("v5p:2x2x4", CHIPS["v5p"], 459e12, tuple(np.ndindex(2, 2, 4)), 1)  # optical switches close cubes only
    assert no_cube.collective_seconds("all-gather", size, (0, 1, 2, 3)) == pytest.approx(size * 3 / 4 / 9e10)
    part = Pod("v5e:8x16", CHIPS["v5e"], 197e12, tuple(np.ndindex(8, 16)), 1)  # of an axis that does close
    assert part.collective_seconds("all-gather", size, tuple(range(8))) == pytest.approx(size * 7 / 8 / 4.5e10)
    assert part.collective_seconds("all-gather", size, tuple(range(16))) == pytest.approx(size * 15 / 16 / 9e10)
    # Half of what half of the chips hold crosses the middle of every row of an axis: rings have two, rows of 8 one.
    for of, chips, links in ((part, 16, 2), (part, 128, 16), (pod, 16, 4 * 2), (pod, 64, 16 * 2)):
        crossing = chips / 2 * size / 2 / (links * of.chip.link_rate)
        assert of.collective_seconds("all-to-all", size, tuple(range(chips))) == pytest.approx(crossing)


def test_groups_that_lie_within_each_other_share_the_links():
    """Every second chip, or every fourth: a step takes as many links, and each of them carries as many groups' data."""
    size, ring = 1e9, Pod("v5e:16x16", CHIPS["v5e"], 197e12, tuple(np.ndindex(16, 16)), 1)
    row = Pod("v5e:4x8", CHIPS["v5e"], 197e12, tuple(np.ndindex(4, 8)), 1)
    for pod, group, rate in (
        (row, (0, 2, 4, 6), 1 / 2),
        (row, (1, 5), 1 / 4),
        (ring, (0, 2, 4, 6), 1 / 2),  # not all the way around
        (ring, (0, 4, 8, 12), 2 / 4),
        (ring, (0, 8), 2 / 8),
        (ring, (0, 15), 1),  # neighbours
        (ring, tuple(range(0, 256, 2)), 2 + 2 / 2),
    ):
        share = size * (len(group) - 1) / len(group)
        assert pod.collective_seconds("all-gather", size, group) == pytest.approx(share / (rate * 4.5e10))
    for pod, pair, rate in (
        (row, (0, 4), 1 / 4),
        (ring, (15, 0), 1),
        (ring, (0, 8), 2 / 8),
        (ring, (0, 2 * 16 + 1), 1 / 2),
    ):
        assert pod.collective_seconds("collective-permute", size, pair) == pytest.approx(size / (rate * 4.5e10))


def test_collectives_between_slices_are_the_hosts():
    """As libtpu writes them for two slices of four chips."""
    line = (
        "%s = (f32[208,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%p), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}"'
        ',_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    work = collective_of(line)
    assert (work.kind, work.slices, work.bytes) == ("all-reduce", 2, 208 * 8 * 128 * 4)
    assert collective_of(line.replace("{1,2}x", "{1:4}x").replace("ALL_REDUCE", "ALL_GATHER")).bytes == 4 * work.bytes
    whole = '"{1,2}x{0:3}"'
    pairs = collective_of(
        line.replace(whole, "{{100000->200000},{200000->100000}}").replace("ALL_REDUCE", "ONE_TO_ONE")
    )
    assert (pairs.kind, pairs.slices, pairs.bytes) == ("collective-permute", 2, work.bytes)
    groups = collective_of(line.replace(whole, "{{100000,100001,200000,200001},{1}}").replace("REDUCE", "TO_ALL"))
    assert (groups.kind, groups.slices, groups.bytes) == ("all-to-all", 2, work.bytes)
    for unknown in (line.replace("ALL_REDUCE", "SOME"), line.replace(whole, "all"), line.split(",_xla_megascale")[0]):
        with pytest.raises(ValueError, match="unknown t.* between slices"):
            collective_of(unknown)
    pod = Pod("v5e:2x2", CHIPS["v5e"], 197e12, tuple(np.ndindex(2, 2)) * 2, 2)
    assert estimate([pairs], pod, lambda _: 0.0).collective_seconds == pytest.approx(work.bytes / 3.125e9)
    assert estimate([work], pod, lambda _: 0.0).collective_seconds == pytest.approx(work.bytes / 3.125e9)


def test_gpus_of_a_machine_are_joined_by_a_switch():
    pod = Pod("h200:8", CHIPS["h200"], 989e12, tuple(np.ndindex(8)) * 2, 2)
    assert pod.collective_seconds("all-to-all", 1e9, tuple(range(8))) == pytest.approx(1e9 * 7 / 8 / 4.5e11)
    for group in ((0, 1), (0, 3, 5, 7), tuple(range(8))):
        expected = 1e9 * (len(group) - 1) / len(group) / 4.5e11
        assert pod.collective_seconds("all-gather", 1e9, group) == pytest.approx(expected)
    assert pod.collective_seconds("all-gather", 1e9, (0, 8)) == pytest.approx(1e9 / 2 / 50e9)


def test_collectives_of_several_machines_use_all_their_networks():
    """Each of a machine's GPUs takes its part from the others' of its place, and they share what came."""
    pod = Pod("h200:8", CHIPS["h200"], 989e12, tuple(np.ndindex(8)) * 4, 4)
    everyone, four, size = tuple(range(32)), (0, 4, 8, 12), 1e9
    gathered = size / 8 * 3 / 4 / 50e9 + size * 7 / 8 / 4.5e11
    assert pod.collective_seconds("all-gather", size, everyone) == pytest.approx(gathered)
    assert pod.collective_seconds("reduce-scatter", size, ()) == pytest.approx(gathered)
    assert pod.collective_seconds("all-reduce", size, everyone) == pytest.approx(2 * gathered)
    expected = size / 2 * 1 / 2 / 50e9 + size / 2 / 4.5e11
    assert pod.collective_seconds("all-gather", size, four) == pytest.approx(expected)
    # What each sends to each of the others has no copies: 24 of 32 are elsewhere, 7 here.
    exchanged = size * 24 / 32 / 50e9 + size * 7 / 32 / 4.5e11
    assert pod.collective_seconds("all-to-all", size, everyone) == pytest.approx(exchanged)
    assert pod.collective_seconds("collective-permute", size, (7, 8)) == pytest.approx(size / 50e9)


def test_kernels_compute_the_blocks_that_their_masks_show():
    """Prefix, suffixes and the vision tower; forward, and the two kernels of the backward pass."""
    config = load_config(ROOT / "configs/revseg_7b.yaml", ["run.dir=."])
    programs = make_programs(config, make_placement(config.mesh))
    prefix, own = 2304, 1792  # padded to blocks of 256

    def flops(name, queries, keys, width=128):
        shapes = (2, 28, queries, width), (2, 4, keys, width)
        arrays = (Array("s32", (1, 7, 7), True), *(Array("bf16", shape, True) for shape in shapes))
        return programs.kernel_flops(Work("kernel", f"jit(update)/splash_mha_{name}", 0.0, 0.0, 1, arrays=arrays))

    one_pair = 2 * 2 * 28 * 128
    causal = sum(256 * 256 * (block + 1) for block in range(prefix // 256))
    for name, products in (("fwd", 2), ("dkv", 5)):
        assert flops(name, prefix, prefix) == pytest.approx(products * one_pair * causal)
    suffixes = 8 * sum(256 * (prefix + 256 * (block + 1)) for block in range(own // 256))
    for name, products in (("fwd", 2), ("dkv", 4), ("dq", 3)):
        assert flops(name, 8 * own, prefix + 8 * own) == pytest.approx(products * one_pair * suffixes)
    assert flops("fwd", 1024, 1024, 80) == pytest.approx(2 * 2 * 2 * 28 * 1024 * 1024 * 80)


@pytest.mark.parametrize("name, products", [("fmhaSoftmax", 2), ("fmhaScaleBiasSoftmaxBackward", 5)])
@pytest.mark.parametrize("mask, share", [("NO_MASK", 1), ("CAUSAL", 0.5)])
def test_attention_of_cudnn_is_counted_by_its_scores(name, products, mask, share):
    program = f"""HloModule jit_step

ENTRY %main (q: bf16[3,40,8,16], k: bf16[3,50,2,16], v: bf16[3,50,2,16]) -> bf16[3,8,40,16] {{
  %q = bf16[3,40,8,16]{{3,2,1,0}} parameter(0)
  %k = bf16[3,50,2,16]{{3,2,1,0}} parameter(1)
  %v = bf16[3,50,2,16]{{3,2,1,0}} parameter(2)
  %a = (bf16[3,8,40,16]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %v), custom_call_target="__cudnn${name}", backend_config={{"cudnn_fmha_backend_config": {{"intermediate_tensor_shape": {{"element_type": "BF16", "dimensions": ["3", "8", "40", "50"]}}, "mask_type": "{mask}"}}}}
  ROOT %o = bf16[3,8,40,16]{{3,1,2,0}} get-tuple-element(%a), index=0
}}
"""  # noqa: E501
    (work,) = program_work(parse(program))
    assert work.flops == products * 2 * 3 * 8 * 40 * 50 * 16 * share
    assert work.bytes == 2 * 16 * 3 * (2 * 40 * 8 + 2 * 50 * 2)


def test_published_sizes_have_the_published_numbers_of_parameters():
    """Billions, from the model cards: 3.75, 8.29, 33.5 and 73.4."""
    from flax import nnx

    from revseg_jax.policy.model import Policy

    for (name, config), billions in zip(PUBLISHED.items(), (3.75, 8.29, 33.5, 73.4), strict=True):
        shapes = nnx.eval_shape(lambda config=config: Policy(config, rngs=nnx.Rngs(0)))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
        assert count / 1e9 == pytest.approx(billions, rel=0.005), name


XLA_SAYS = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.34G of 15.75G hbm. Exceeded hbm capacity by 8.59G.

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(update)/while/body/dot_general"
     Shape: f32[32768,32768]{1,0:T(8,128)}
     Allocation type: HLO temp
     ==========================

  2. Size: 1.09G
     Shape: bf16[152064,3584]{1,0:T(8,128)(2,1)}
     Allocation type: parameter
     ==========================
"""  # noqa: E501


def test_a_program_that_is_too_large_names_its_largest_buffers():
    said = too_large(XLA_SAYS, POD_PROGRAM)
    assert said.startswith("24.34G of 15.75G HBM; the largest buffers: 4.00G f32[32768,32768] dot_general, 1.09G bf16[")
    assert "\n" not in said
    only_total = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, (34.60G) exceeds available HBM (15.75G).\nMore."
    said = too_large(only_total, POD_PROGRAM)
    assert "(34.60G) exceeds" in said and "largest arrays, over all chips: 0.01 GiB bf16[28,512,256], 0.00" in said
    assert "\n" not in said


def compile_command(*arguments):
    command = [sys.executable, "-m", "revseg_jax.cli", "compile", *arguments, "--json"]
    # The compiler's least effort takes half the time; no test asks how good its schedule is.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
    }
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


TINY = ("--config", "configs/demo.yaml", "--topology", "v5e:2x2", "policy.dtype=bfloat16", "mesh.tensor=2")


@needs_libtpu
def test_the_tiny_update_compiles_for_a_small_slice():
    done = compile_command(*TINY, "--programs", "update")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chips"] == 4 and found["mesh"] == {"slice": 1, "data": 1, "fsdp": 2, "tensor": 2} and found["fits"]
    update = found["programs"]["update"]
    assert update["open_loops"] == [0, 1] and update["flops"] > 0 and update["collective_bytes"]["all-gather"] > 0
    assert 0 < found["mfu_without_overlap"] < found["mfu"] < 1 and "predicted MFU" in done.stdout
    memory = found["memory"]
    # Two moments of what is trained; everything, the vision tower that is not, in half or quarters.
    assert memory["reference"] < memory["parameters"] < memory["optimizer"] < 3 * memory["reference"]
    assert memory["peak"] < memory["hbm"] == 16 * 2**30


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1"])
def test_a_chip_is_one_device(topology):
    """Also one of two cores."""
    done = compile_command("--config", "configs/demo.yaml", "--topology", topology, "mesh.fsdp=3")
    assert done.returncode == 2 and "does not use the 4 devices" in done.stderr, done.stderr[-3000:]


@needs_libtpu
@pytest.mark.slow
def test_the_tiny_step_compiles_for_a_small_slice():
    """All programs; the reference's pass computes what the model needs, and little more."""
    done = compile_command(*TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["programs"]) == set(PROGRAMS)
    config = load_config(ROOT / "configs/demo.yaml")
    programs = make_programs(config, make_placement(config.mesh))
    needed = sum(forward_flops(programs.model, programs.full_batch())) / 4
    assert needed < found["programs"]["score"]["flops"] < 1.3 * needed  # masked pairs are computed too
    assert found["step_seconds"] > 0 and "the paper's took 725 s" in done.stdout


def test_a_chain_of_one_turn_has_no_second_one():
    config = load_config(ROOT / "configs/demo.yaml", ["chain.turns=1"])
    programs = make_programs(config, make_placement(config.mesh))
    assert programs.names == tuple(name for name in PROGRAMS if name not in ("turn2", "decode2"))
    # A second each: prefill and decode, the reference's pass, the update.
    compiled = {name: Compiled(SimpleNamespace(seconds=1.0), 0, 0.0, (0, 1)) for name in programs.names}
    assert step_seconds(programs, compiled) == 4


@pytest.mark.parametrize(
    "topology, peak, said",
    [
        ("h200:8", 0.931, "set XLA_PYTHON_CLIENT_MEM_FRACTION to 0.94 or more"),
        ("h200:8", 0.7, ""),
        ("v5p:2x2x1", 0.9, ""),
    ],
)
def test_what_jax_leaves_of_a_gpu_is_said_where_it_is_needed(topology, peak, said):
    found = {"policy": "3B", "topology": topology, "chips": 8, "mesh": {}, "largest_program": "update", "programs": {}}
    text = table(found | {"memory": {"peak": peak * 2**37, "hbm": 2.0**37}})
    assert said in text and bool(said) == ("FRACTION" in text)


@needs_cuda
def test_the_tiny_step_compiles_for_gpus():
    done = compile_command("--config", "configs/demo.yaml", "--topology", "h200:2", "policy.dtype=bfloat16")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chips"] == 2 and found["fits"] and found["memory"]["hbm"] == 143771 * 2**20
    assert set(found["programs"]) == set(PROGRAMS)
    update = found["programs"]["update"]
    assert update["flops"] > 0 and sum(update["collective_bytes"].values()) > 0 and 0 < found["mfu"] < 1


@needs_cuda
def test_decoding_on_gpus_copies_no_weights():
    """A step of the loop over tokens reads each layer's parameters once, and half as much again besides."""
    options = "policy.path=Qwen2.5-VL-3B-Instruct", "policy.dtype=bfloat16", "rollout.group_size=2"
    done = compile_command("--config", "configs/demo.yaml", "--topology", "h200:1", "--programs", "decode", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    decode = json.loads(done.stdout.splitlines()[-1])["programs"]["decode"]
    weights = 2 * (PUBLISHED["Qwen2.5-VL-3B-Instruct"].text.num_layers * 77_076_992 + 151936 * 2048)
    assert weights < decode["bytes"] / decode["open_loops"][1] < 1.5 * weights


@needs_cuda
@pytest.mark.slow
def test_the_update_of_the_7b_compiles_for_eight_gpus():
    """64 prompts at a time. What keyframes keep stays spread over the GPUs, 20 GiB on each, and is gathered nowhere."""
    options = "--config", "configs/revseg_7b.yaml", "--topology", "h200:8", "--programs", "update"
    done = compile_command(*options, "learner.logprob_chunk=2560")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["memory"]["activations"] < 100 * 2**30 and found["mfu_without_overlap"] > 0.5


@needs_libtpu
@pytest.mark.slow
def test_the_update_of_the_3b_compiles_for_a_pod():
    config = ("--config", "configs/revseg_3b.yaml", "--topology", "v5p:4x4x4", "--programs", "update")
    done = compile_command(*config)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chips"] == 64 and found["fits"] and 0.3 < found["mfu"] < 1


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("prompts", [12288, 32768])  # with what stays in memory during a step; by the program alone
def test_what_does_not_fit_is_named_with_its_size(prompts):
    options = (f"rollout.prompts_per_step={prompts}", f"rollout.prompts_per_batch={prompts}")
    done = compile_command(*TINY, "--programs", "decode", *options)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("revseg: error: v5e:2x2: ") and "decode" in said and "largest" in said
    assert re.search(r"\d+\.\d\d GiB", said) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--programs", "backward"], "--programs backward is not one of all, prefill"),
        (["--topology", "k80:8"], "topology k80:8: k80 is not one of v4, v5e, v5p, v6e, a100, h100, h200"),
        (["--topology", "v5e:4"], "topology 'v5e:4' is not of the form v5p:4x4x4 or h200:8"),
        (["--topology", "h200:2x4"], "topology 'h200:2x4' is not of the form v5p:4x4x4 or h200:8"),
        (["policy.path=Qwen3-VL-8B"], "Qwen2.5-VL-3B-Instruct"),
        (["rollout.prompts_per_step=3"], "rollout.prompts_per_step=3 must be a multiple of"),
        (["mesh.axes.width=[rows]"], "mesh.axes.width names 'rows'"),
        (["mesh.axes.heads=[fsdp]"], "width and heads cannot both be spread over 'fsdp'"),
    ],
)
@needs_libtpu
def test_what_cannot_be_compiled_is_said_in_one_line(arguments, said, capsys):
    options = ["compile", "--config", "configs/demo.yaml"]
    if "--topology" not in arguments:
        options += ["--topology", "v5e:2x2"]
    with pytest.raises(SystemExit) as exit:
        main([*options, *arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("topology, needed", [("v5e:2x2", "revseg-jax[tpu]"), ("h200:8", "revseg-jax[cuda]")])
def test_a_missing_compiler_is_named_with_its_extra(topology, needed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape(f"pip install '{needed}'")):
        describe(topology, 1)
