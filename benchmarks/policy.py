"""The policy against transformers' torch model: prefill, forward + backward, peak memory; and memory while loading.

    python benchmarks/policy.py [--size 100m|1b|3b|7b] [--dtype float32|bfloat16] [--frames 16] [--rounds 5]
    python benchmarks/policy.py --loading [--size ...] [--dtype ...] [--shards 1]

Random weights, written into --folder first (default: a temporary one). Every side is a process of its own, so that its
peak memory is its own; they take turns, and a ratio compares the medians of the same rounds. On a GPU both sides use
it, with TF32 in float32 matmuls on both, and peak memory is the GPU's as each side's allocator counts it; `mfu` divides
by the fastest matmul of the same type measured there. Prints one JSON object; a side that did not run is listed in
`failed`, its error above. `--loading` loads the checkpoint in a fresh process and reports its peak memory; on a CPU, by
how much that exceeded what the parameters take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

SIDE, TEXT, TAIL = 448, 200, 200  # pixels of a frame; text tokens; positions whose logits are computed
SIDES = ("ours", "torch", "torch.compile")
# Decoder: width, feed-forward, layers, heads, key heads, vocabulary, tied; vision: depth, width, feed-forward, heads.
SIZES = {
    "100m": ((768, 2048, 8, 12, 4, 32000, True), (8, 512, 1408, 8)),
    "1b": ((2048, 8192, 16, 16, 4, 65536, True), (16, 1280, 3420, 16)),  # no published one; for machines of 8 GB
    "3b": ((2048, 11008, 36, 16, 2, 151936, True), (32, 1280, 3420, 16)),
    "7b": ((3584, 18944, 28, 28, 4, 152064, False), (32, 1280, 3420, 16)),
}


def write_folder(folder: Path, size: str, dtype: str, shard_bytes: int) -> None:
    """A checkpoint of random weights, one tensor in memory at a time."""
    import jax.numpy as jnp
    from flax import nnx

    from revseg_jax.policy.checkpoint import resolve_folder
    from revseg_jax.policy.config import read_config, to_hf
    from revseg_jax.policy.hf_weights import weights_of
    from revseg_jax.policy.model import Policy
    from revseg_jax.policy.safetensors_files import write_checkpoint

    source = resolve_folder("embedded")
    width, inner, layers, heads, key_heads, vocabulary, tied = SIZES[size][0]
    depth, vision_width, vision_inner, vision_heads = SIZES[size][1]
    config = read_config(source)
    sixth = width // heads // 2 // 6
    text = replace(
        config.text,
        **dict(hidden_size=width, intermediate_size=inner, num_layers=layers, num_heads=heads),
        **dict(num_kv_heads=key_heads, head_dim=width // heads, vocab_size=vocabulary, tie_word_embeddings=tied),
        mrope_section=(width // heads // 2 - 4 * sixth, 2 * sixth, 2 * sixth),
    )
    vision = replace(
        config.vision,
        **dict(depth=depth, hidden_size=vision_width, intermediate_size=vision_inner, num_heads=vision_heads),
        **dict(out_hidden_size=width, patch_size=14, window_size=112),
        fullatt_block_indexes=tuple(range(depth // 4 - 1, depth, depth // 4)),
    )
    config = replace(config, text=text, vision=vision)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    (folder / "config.json").write_text(json.dumps({**to_hf(config), "dtype": dtype}))
    weights = weights_of(nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0))))
    stored = np.dtype(jnp.dtype(dtype))
    noise = np.random.default_rng(0).standard_normal(999_983, np.float32)  # a prime: repeated, but no two rows alike

    def arrays():
        for weight in weights:
            for name in weight.names:
                scale = weight.stored_shape[-1] ** -0.5 if len(weight.stored_shape) > 1 else 0.02
                around = np.float32("norm" in name or "ln_q" in name)
                yield name, np.resize((noise * np.float32(scale) + around).astype(stored), weight.stored_shape)

    shapes = {name: weight.stored_shape for weight in weights for name in weight.names}
    write_checkpoint(folder, shapes, stored, arrays(), shard_bytes)


def conversation(config, frames: int):
    """One video and text: tokens [length], grid, patches [slices, patches, patch_dim]."""
    rng = np.random.default_rng(1)
    side = SIDE // config.vision.patch_size
    grid = (frames // config.vision.temporal_patch_size, side, side)
    count = int(np.prod(grid)) // config.vision.spatial_merge_size**2
    text = rng.integers(0, 1000, TEXT)
    tokens = np.concatenate([text[:20], np.full(count, config.video_token_id), text[20:]])
    return tokens, grid, rng.standard_normal((grid[0], side * side, config.vision.patch_dim), np.float32)


def ours(folder: Path, dtype: str, frames: int):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from revseg_jax.policy import load_policy
    from revseg_jax.policy.model import Policy
    from revseg_jax.policy.rope import sequence_positions

    policy = load_policy(folder, dtype=dtype, param_dtype=dtype, remat="dots").policy
    tokens, grid, patches = conversation(policy.config, frames)
    positions = sequence_positions(tokens, policy.config, [grid], [1.0])[:, None]
    inputs = jax.device_put((tokens[None].astype(np.int32), positions, jnp.asarray(patches, policy.dtype)))

    def logits(policy: Policy, tokens, positions, patches):
        features = policy.vision(patches, grid[1], grid[2], policy.remat).reshape(1, -1, policy.config.text.hidden_size)
        hidden, _, _ = policy.prefix_forward(tokens, positions, features)
        return policy.text.logits(hidden[:, -TAIL:])

    graphdef, state = nnx.split(policy)

    def loss(state, tokens, positions, patches):
        logprobs = jax.nn.log_softmax(logits(nnx.merge(graphdef, state), tokens, positions, patches)[:, :-1])
        return -jnp.take_along_axis(logprobs, tokens[:, 1 - TAIL :, None], 2).mean()

    forward, backward = jax.jit(logits), jax.jit(jax.value_and_grad(loss))
    device = jax.devices()[0]
    return (
        lambda: np.asarray(forward(policy, *inputs)[0, -1, :8]),
        lambda: float(jax.block_until_ready(backward(state, *inputs))[0]),
        lambda: memory("VmHWM") if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"],
    )


def torchs(folder: Path, dtype: str, frames: int, compiled: bool):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from revseg_jax.policy.config import read_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # TF32, which XLA takes on GPUs
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    config = read_config(folder)
    tokens, grid, patches = conversation(config, frames)
    ids = torch.tensor(tokens, device=device)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": ((ids == config.video_token_id) * 2).int(),
        "pixel_values_videos": torch.tensor(patches.reshape(-1, patches.shape[-1]), device=device).to(model.dtype),
        "video_grid_thw": torch.tensor([grid]),
        "second_per_grid_ts": torch.tensor([1.0]),
        "logits_to_keep": TAIL,
        "use_cache": False,
    }
    run = torch.compile(model) if compiled else model

    def forward():
        with torch.no_grad():
            return run(**inputs).logits[0, -1, :8].float().cpu().numpy()

    def backward():
        model.zero_grad(set_to_none=True)
        logprobs = torch.log_softmax(run(**inputs).logits[0, :-1].float(), -1)
        loss = -logprobs.gather(1, ids[0, 1 - TAIL :, None]).mean()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return forward, backward, torch.cuda.max_memory_allocated if device == "cuda" else lambda: memory("VmHWM")


def memory(field: str) -> int:
    """Bytes of this process, from the kernel: VmHWM is the peak, VmRSS now."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def worker(arguments: argparse.Namespace) -> None:
    """Answers each line of the input, "forward" or "backward", by the seconds one call took and what it returned."""
    make = ours if arguments.worker == "ours" else torchs
    extra = () if make is ours else (arguments.worker == "torch.compile",)
    forward, backward, peak = make(arguments.folder, arguments.dtype, arguments.frames, *extra)
    for line in sys.stdin:
        begin = time.perf_counter()
        value = np.asarray({"forward": forward, "backward": backward}[line.strip()]())
        took = time.perf_counter() - begin
        print(json.dumps({"seconds": took, "value": value.tolist(), "peak_bytes": peak()}), flush=True)


def measure(arguments: argparse.Namespace) -> dict:
    processes = {}
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the sides share a GPU
    for side in arguments.sides:
        command = [sys.executable, __file__, "--worker", side, "--folder", str(arguments.folder)]
        command += ["--dtype", arguments.dtype, "--frames", str(arguments.frames)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[side] = subprocess.Popen(command, env=environment, **pipes)

    def ask(side: str, what: str) -> dict | None:
        process = processes[side]
        try:
            process.stdin.write(what + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        line = process.stdout.readline()
        return json.loads(line) if line else None  # None: this side does not run (see its error above)

    result = {}
    for what in ("forward",) if arguments.forward_only else ("forward", "backward"):
        first = {side: ask(side, what) for side in processes}  # compiles
        running = [side for side in processes if first[side]]
        if not running:
            raise SystemExit(f"{what}: no side runs, see the errors above")
        rounds = [{side: ask(side, what) for side in running} for _ in range(arguments.rounds)]
        times = {side: statistics.median(answers[side]["seconds"] for answers in rounds) for side in running}
        others = [times[side] for side in running if side != "ours"]
        values = [rounds[-1][side]["value"] for side in running]
        result[what] = {
            "seconds": times,
            "first_seconds": {side: first[side]["seconds"] for side in running},
            "peak_bytes": {side: rounds[-1][side]["peak_bytes"] for side in running},
            "difference_of_results": max(float(np.abs(np.subtract(a, b)).max()) for a in values for b in values),
            "failed": [side for side in processes if side not in running],
            "best_torch_over_ours": min(others) / times["ours"] if others and "ours" in times else None,
        }
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return result


def operations(config, frames: int) -> tuple[int, float]:
    """Tokens, and floating-point operations of one forward pass with logits at `TAIL` positions."""
    text, vision = config.text, config.vision
    tokens, grid, _ = conversation(config, frames)
    patches, length = int(np.prod(grid)), len(tokens)
    attention = text.hidden_size * text.head_dim * (2 * text.num_heads + 2 * text.num_kv_heads)
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    seen = length / 2 * 2 * text.num_heads * text.head_dim  # causal: half of the keys, twice (scores and values)
    total = 2 * length * text.num_layers * (layer + seen) + 2 * TAIL * text.hidden_size * text.vocab_size
    block = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
    full, window = grid[1] * grid[2], (vision.window_size // vision.patch_size) ** 2
    whole = len(vision.fullatt_block_indexes)
    keys = (whole * full + (vision.depth - whole) * window) / vision.depth
    total += 2 * patches * (vision.patch_dim * vision.hidden_size + vision.depth * block)
    total += 2 * patches * vision.depth * 2 * keys * vision.hidden_size
    wide = vision.hidden_size * vision.spatial_merge_size**2
    total += 2 * patches // vision.spatial_merge_size**2 * wide * (wide + vision.out_hidden_size)
    return length, float(total)


def matmul_peak(dtype: str) -> tuple[str, float]:
    """Device, and operations a second of its fastest square matmul."""
    import jax
    import jax.numpy as jnp

    size = 8192 if jax.default_backend() != "cpu" else 2048
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - begin)
    return jax.devices()[0].device_kind, 2 * size**3 / min(times)


def load_once(folder: Path, dtype: str) -> None:
    import jax
    import jax.numpy as jnp

    from revseg_jax.policy import load_policy

    jnp.zeros(1).block_until_ready()
    before, begin = memory("VmRSS"), time.perf_counter()
    loaded = load_policy(folder, dtype=dtype, param_dtype=dtype)
    leaves = jax.block_until_ready(jax.tree.leaves(loaded.policy))
    seconds = time.perf_counter() - begin
    held = sum(leaf.nbytes for leaf in leaves)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    numbers = {"stored_bytes": stored, "parameter_bytes": held, "seconds": seconds, "peak_bytes": memory("VmHWM")}
    numbers |= {"before_bytes": before}
    if jax.default_backend() == "cpu":  # elsewhere the parameters are not in this process's memory
        numbers |= {"peak_over_parameters_gib": (numbers["peak_bytes"] - held) / 2**30}
    print(json.dumps(numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--loading", action="store_true")
    parser.add_argument("--shards", type=int, default=1, help="about how many files the checkpoint is split into")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "load":
        return load_once(arguments.folder, arguments.dtype)
    if arguments.worker:
        return worker(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary) / arguments.size
        result = {"command": " ".join(sys.argv), "machine": platform.machine(), "cores": os.cpu_count()}
        result |= {"size": arguments.size, "dtype": arguments.dtype}
        if not (arguments.folder / "config.json").exists():
            write_folder(arguments.folder, arguments.size, arguments.dtype, 4_900_000_000 // arguments.shards)
        if arguments.loading:
            command = [sys.executable, __file__, "--worker", "load", "--folder", str(arguments.folder)]
            done = subprocess.run(command + ["--dtype", arguments.dtype], stdout=subprocess.PIPE, check=True)
            result |= json.loads(done.stdout)
        else:
            from revseg_jax.policy.config import read_config

            tokens, flops = operations(read_config(arguments.folder), arguments.frames)
            result |= measure(arguments)
            # Last, so that this process does not hold the device while the others run.
            result["device"], peak = matmul_peak(arguments.dtype)
            result |= {"tokens": tokens, "forward_flops": flops, "matmul_flops_per_second": peak}
            for side, seconds in result["forward"]["seconds"].items():
                result.setdefault("prefill_tokens_per_second", {})[side] = tokens / seconds
                result.setdefault("mfu", {})[side] = flops / seconds / peak
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
