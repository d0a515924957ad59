"""Weights in and out of the Hugging Face layout: a table of names, and what happens to the axes."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from revseg_jax.errors import InputError
from revseg_jax.parallel.processes import leads
from revseg_jax.parallel.sharding import Placement, parameter_spec
from revseg_jax.policy.model import Policy
from revseg_jax.policy.safetensors_files import SHARD_BYTES, StoredTensor, open_checkpoint, write_checkpoint

COPY_BYTES = 2 << 20  # of a tensor that is copied at a time: what is turned stays in the processor's caches
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Published tensor name ("{}": layer number) -> path in the policy, and how many leading axes of our kernel are inputs.
# A kernel [inputs..., outputs...] is stored as [outputs, inputs], flattened. 0 inputs: the elements keep their order.
TABLE = {
    EMBEDDINGS: ("text.embedding", 0),
    "model.layers.{}.input_layernorm.weight": ("text.layers.input_norm.scale", 0),
    "model.layers.{}.self_attn.q_proj.weight": ("text.layers.query.kernel", 1),
    "model.layers.{}.self_attn.q_proj.bias": ("text.layers.query.bias", 0),
    "model.layers.{}.self_attn.k_proj.weight": ("text.layers.key.kernel", 1),
    "model.layers.{}.self_attn.k_proj.bias": ("text.layers.key.bias", 0),
    "model.layers.{}.self_attn.v_proj.weight": ("text.layers.value.kernel", 1),
    "model.layers.{}.self_attn.v_proj.bias": ("text.layers.value.bias", 0),
    "model.layers.{}.self_attn.o_proj.weight": ("text.layers.out.kernel", 2),
    "model.layers.{}.post_attention_layernorm.weight": ("text.layers.post_norm.scale", 0),
    "model.layers.{}.mlp.gate_proj.weight": ("text.layers.mlp.gate.kernel", 1),
    "model.layers.{}.mlp.up_proj.weight": ("text.layers.mlp.up.kernel", 1),
    "model.layers.{}.mlp.down_proj.weight": ("text.layers.mlp.down.kernel", 1),
    "model.norm.weight": ("text.norm.scale", 0),
    HEAD: ("text.lm_head.kernel", 1),
    "visual.patch_embed.proj.weight": ("vision.patch_embed.kernel", 1),
    "visual.blocks.{}.norm1.weight": ("vision.blocks.norm1.scale", 0),
    "visual.blocks.{}.attn.qkv.weight": ("vision.blocks.qkv.kernel", 1),
    "visual.blocks.{}.attn.qkv.bias": ("vision.blocks.qkv.bias", 0),
    "visual.blocks.{}.attn.proj.weight": ("vision.blocks.proj.kernel", 2),
    "visual.blocks.{}.attn.proj.bias": ("vision.blocks.proj.bias", 0),
    "visual.blocks.{}.norm2.weight": ("vision.blocks.norm2.scale", 0),
    "visual.blocks.{}.mlp.gate_proj.weight": ("vision.blocks.mlp.gate.kernel", 1),
    "visual.blocks.{}.mlp.gate_proj.bias": ("vision.blocks.mlp.gate.bias", 0),
    "visual.blocks.{}.mlp.up_proj.weight": ("vision.blocks.mlp.up.kernel", 1),
    "visual.blocks.{}.mlp.up_proj.bias": ("vision.blocks.mlp.up.bias", 0),
    "visual.blocks.{}.mlp.down_proj.weight": ("vision.blocks.mlp.down.kernel", 1),
    "visual.blocks.{}.mlp.down_proj.bias": ("vision.blocks.mlp.down.bias", 0),
    "visual.merger.ln_q.weight": ("vision.merger.norm.scale", 0),
    "visual.merger.mlp.0.weight": ("vision.merger.fc1.kernel", 1),
    "visual.merger.mlp.0.bias": ("vision.merger.fc1.bias", 0),
    "visual.merger.mlp.2.weight": ("vision.merger.fc2.kernel", 1),
    "visual.merger.mlp.2.bias": ("vision.merger.fc2.bias", 0),
}


@dataclass(frozen=True)
class Weight:
    """One parameter of the policy and the tensors it is stored as.

    Attributes:
      path: in the policy's state
      shape: of the parameter; the first axis counts layers when it is stacked
      names: the stored tensors, one per layer when stacked
      stored_shape: of each stored tensor
      inputs: leading axes (layers apart) that the file keeps last; 0 keeps the order
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    names: tuple[str, ...]
    stored_shape: tuple[int, ...]
    inputs: int


def weights_of(policy: Policy) -> list[Weight]:
    """Every parameter of the policy, in the order of `TABLE`."""
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(policy, nnx.Param))}
    vision = policy.config.vision
    weights = []
    for name, (dotted, inputs) in TABLE.items():
        path = tuple(dotted.split("."))
        if path not in shapes:  # tied embeddings: no lm_head
            continue
        shape, stacked = shapes[path], "{}" in name
        one = shape[stacked:]
        if name == "visual.patch_embed.proj.weight":  # a convolution whose stride is its size
            patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
            stored_shape = (vision.hidden_size, *patch)
        elif inputs:
            stored_shape = (math.prod(one[inputs:]), math.prod(one[:inputs]))
        else:
            stored_shape = one if name == "model.embed_tokens.weight" else (math.prod(one),)
        names = tuple(name.format(layer) for layer in range(shape[0])) if stacked else (name,)
        weights.append(Weight(path, shape, stacked, names, stored_shape, inputs))
    return weights


def from_stored(weight: Weight, tensor: np.ndarray) -> np.ndarray:
    """The stored tensor of one layer as our kernel or bias: a view, so slices of it read only their bytes."""
    shape = weight.shape[weight.stacked :]
    split = tensor.reshape(shape[weight.inputs :] + shape[: weight.inputs])
    outputs = len(shape) - weight.inputs
    return split.transpose(*range(outputs, len(shape)), *range(outputs))


def to_stored(weight: Weight, array: np.ndarray) -> np.ndarray:
    """The inverse of `from_stored`."""
    axes = range(array.ndim)
    return array.transpose(*axes[weight.inputs :], *axes[: weight.inputs]).reshape(weight.stored_shape)


def read_weight(
    weight: Weight, tensors: dict[str, StoredTensor], dtype: np.dtype, index: tuple[slice, ...] | None = None
) -> np.ndarray:
    """The part `index` (default: all) of one parameter, cast to `dtype`. Nothing else is read from the files."""
    index = index or (slice(None),) * len(weight.shape)
    shape = tuple(len(range(size)[cut]) for size, cut in zip(weight.shape, index, strict=True))
    result = aligned_empty(shape, dtype)
    if not weight.stacked:
        copy_tensor(weight, tensors[weight.names[0]], index, result)
        return result
    for name, layer in zip(weight.names[index[0]], result, strict=True):
        copy_tensor(weight, tensors[name], index[1:], layer)
    return result


def copy_tensor(weight: Weight, tensor: StoredTensor, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Fills `out` with a part of one layer, some of the file at a time: what is mapped counts as memory, too."""
    axis = weight.inputs  # the outermost one of the file
    step = max(1, COPY_BYTES * out.shape[axis] // out.nbytes)
    for begin in range(0, out.shape[axis], step):
        piece = (*[slice(None)] * axis, slice(begin, begin + step))
        out[piece] = from_stored(weight, tensor.array())[index][piece]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like np.empty, at a multiple of 64 bytes: on CPU devices JAX then uses the memory as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def load_weights(
    folder: str | Path, policy: Policy, param_dtype: str = "float32", placement: Placement | None = None
) -> str:
    """Fills the policy, whose parameters may be abstract (`nnx.eval_shape`), from a checkpoint folder.

    Takes float16, bfloat16 and float32 files, one or several with an index, with the published names or those of
    transformers 5's modules. With a placement a process reads the parts that its devices hold, and nothing else. On the
    host one parameter is held at a time beside the result. Returns the name of the type that holds every stored tensor
    exactly. Raises one InputError that names every missing, unexpected or wrongly shaped tensor and every missing or
    truncated file.
    """
    folder = Path(folder)
    stored, problems = open_checkpoint(folder)
    tensors = {published_name(name): tensor for name, tensor in stored.items()}
    tied = policy.config.text.tie_word_embeddings
    if (
        tied and EMBEDDINGS not in tensors and HEAD in tensors
    ):  # of two names safetensors keeps the first in the alphabet
        tensors[EMBEDDINGS] = tensors.pop(HEAD)
    weights = weights_of(policy)
    wanted = {name: weight.stored_shape for weight in weights for name in weight.names}
    if tensors:  # a single unreadable file is one problem, not hundreds
        problems += [f"{name} is missing" for name in wanted if name not in tensors]
    ignored = {HEAD} if tied else set()
    problems += [f"{name} is unexpected" for name in sorted(tensors.keys() - wanted.keys() - ignored)]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if tensors.get(name) and tensors[name].shape != shape
    ]
    if problems:
        raise InputError(f"weights in {folder} do not fit its config.json: {in_one_line(problems)}")
    dtype = np.dtype(jnp.dtype(param_dtype))

    def place(weight: Weight) -> jax.Array:
        if placement is None:
            return jax.device_put(read_weight(weight, tensors, dtype))
        spec = parameter_spec(".".join(weight.path), weight.shape, placement)
        parts: dict[tuple, np.ndarray] = {}  # devices that hold copies of the same part read it once

        def part(index: tuple[slice, ...]) -> np.ndarray:
            key = tuple((cut.start, cut.stop) for cut in index)
            if key not in parts:
                parts[key] = read_weight(weight, tensors, dtype, index)
            return parts[key]

        return jax.make_array_from_callback(weight.shape, NamedSharding(placement.mesh, spec), part)

    nnx.update(policy, nnx.from_flat_state([(weight.path, nnx.Param(place(weight))) for weight in weights]))
    return str(jnp.result_type(*{tensors[name].dtype for name in wanted}))


def save_weights(policy: Policy, folder: str | Path, dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the policy's parameters into an existing folder under the published names, as `dtype`.

    Of several processes all must call it, and the first one writes.
    """
    weights = weights_of(policy)
    state = dict(nnx.to_flat_state(nnx.state(policy, nnx.Param)))

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for weight in weights:
            host = fetch(state[weight.path][...])
            for name, array in zip(weight.names, host if weight.stacked else [host], strict=True):
                yield name, to_stored(weight, array)

    if not leads():
        deque(arrays(), maxlen=0)  # the first process needs the others' parts
        return
    shapes = {name: weight.stored_shape for weight in weights for name in weight.names}
    write_checkpoint(Path(folder), shapes, np.dtype(jnp.dtype(dtype)), arrays(), shard_bytes)


def fetch(array: jax.Array) -> np.ndarray:
    """All of it, in every process of a run."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def embeddings_differ(folder: Path) -> bool:
    """Whether files hold an output matrix of their own beside the embeddings: then these are not tied, whatever the
    config says, as in transformers."""
    stored, problems = open_checkpoint(folder)
    tensors = {published_name(name): tensor for name, tensor in stored.items()}
    first, second = (tensors.get(name) for name in (EMBEDDINGS, HEAD))
    if problems or not first or not second or first.shape != second.shape:
        return False
    rows = max(1, COPY_BYTES // math.prod(first.shape[1:]) // first.dtype.itemsize)
    starts = range(0, first.shape[0], rows)
    return any((first.array()[n : n + rows] != second.array()[n : n + rows]).any() for n in starts)


def in_one_line(problems: Sequence[str]) -> str:
    """All of them; what is said alike of several layers is said once, of `layers.{0-27}`."""
    said: dict[tuple[str, str], set[str]] = {}
    for problem in problems:
        before, number, after = (re.split(r"(?<=\.)(\d+)(?=\.)", problem, maxsplit=1) + ["", ""])[:3]
        said.setdefault((before, after), set()).add(number)
    return "; ".join(f"{before}{_numbers(found)}{after}" for (before, after), found in said.items())


def _numbers(found: set[str]) -> str:
    if len(found) == 1:
        return next(iter(found))
    numbers = sorted(map(int, found))
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}-{numbers[-1]}}}" if whole else f"{{{','.join(map(str, numbers))}}}"


def published_name(name: str) -> str:
    """`model.language_model.layers...` and `model.visual...`, transformers 5's module names, as they are published."""
    return re.sub(r"^model\.(?:(language_model)\.|(?=visual\.))", lambda m: "model." if m[1] else "", name)
