"""A policy folder: config.json, safetensors, tokenizer and processor files as published, and our chain.yaml."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from jax.sharding import Mesh
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from revseg_jax.config import AxesConfig, ChainConfig, to_yaml, yaml_fault
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.parallel.processes import agree, leads
from revseg_jax.parallel.sharding import Placement, place
from revseg_jax.paths import AnyPath, is_remote, local_copy, path_of, upload
from revseg_jax.policy.attention import AttentionChoice
from revseg_jax.policy.config import from_hf, read_config, to_hf
from revseg_jax.policy.conversation import conversation_logits
from revseg_jax.policy.hf_weights import embeddings_differ, load_weights, save_weights
from revseg_jax.policy.model import Policy
from revseg_jax.policy.packing import pack
from revseg_jax.policy.remat import POLICIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TYPES = ("float32", "bfloat16", "float64")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
REQUIRED = ("config.json", *TOKENIZER)
# Everything of a published folder that is neither weights nor config.json.
COPIED = (
    *(*TOKENIZER, "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)


@dataclass(frozen=True)
class LoadedPolicy:
    """Attributes:
    policy: with its parameters on the mesh, or on the default device without one
    tokenizer: of the checkpoint
    chain: the prompts and sizes it was trained with, from chain.yaml; None when the folder has none
    folder: where it was read from
    stored_dtype: of the weights in its files
    placement: of the parameters on the mesh; None without one
    lengths: that conversations are padded to, in tokens; () for two an octave from 64 on
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerFast
    chain: ChainConfig | None
    folder: Path
    stored_dtype: str
    placement: Placement | None = None
    lengths: tuple[int, ...] = ()

    def logits(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        second_per_grid_ts: np.ndarray | None = None,
        mm_token_type_ids: np.ndarray | None = None,
    ) -> np.ndarray:
        """Next-token logits float32 [B, length, vocab] of what transformers' processor returns (as NumPy, see `pack`).

        What stands at padding means nothing. Compiles once for each of `lengths` and each bucket of images and videos;
        a longer batch is an InputError. `mm_token_type_ids` repeats what `input_ids` say and is not read.
        """
        images, videos = (pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)
        packed = pack(self.policy.config, input_ids, attention_mask, *images, *videos, second_per_grid_ts, self.lengths)
        rows, length = np.shape(input_ids)
        return conversation_logits(self.policy, packed, self.placement)[:rows, :length]

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load_policy` and transformers load, in the type that the weights were stored in."""
        save_policy(self.policy, folder, self.folder, self.chain, self.stored_dtype)


def resolve_folder(path: str | Path) -> Path:
    """The folder itself, a local copy of a remote one, or that of the tiny policy shipped with the package for
    "embedded"."""
    if str(path) == "embedded":
        return Path(str(importlib.resources.files("revseg_jax"))) / "assets" / "policy"
    folder = path_of(path)
    return local_copy(folder) if folder.is_dir() else folder


def policy_digest(path: str | Path) -> str:
    """16 hex digits over a policy folder's config, tokenizer and weights, byte by byte."""
    folder = resolve_folder(path)
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *(folder / name for name in ("config.json", "tokenizer.json"))]):
        if file.is_file():
            with open(file, "rb") as content:
                digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def load_policy(
    folder: str | Path,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    mesh: Mesh | None = None,
    attention: str = "auto",
    axes: AxesConfig = AxesConfig(),  # noqa: B008 (frozen)
    lengths: Sequence[int] = (),
) -> LoadedPolicy:
    """Loads a checkpoint folder in Hugging Face layout, or "embedded".

    dtype: of the activations; param_dtype: of the parameters; both of `TYPES`, float64 under JAX's x64. remat: a name
    of `revseg_jax.policy.remat`. mesh: of `revseg_jax.parallel.mesh.make_mesh`; every process reads only what its
    devices hold. attention: the implementation (see `AttentionChoice`). axes: how arrays are spread over the mesh.
    lengths: of sequences, in tokens, that `logits` compiles for; default: two an octave from 64 on.
    Raises InputError that names what is missing or wrong in the folder, or an argument that is none of these.
    """
    for argument, value, allowed in (
        ("dtype", dtype, TYPES),
        ("param_dtype", param_dtype, TYPES),
        ("remat", remat, ("none", *POLICIES)),
    ):
        if value not in allowed:
            raise InputError(f"{argument}={value!r} is not one of {', '.join(allowed)}")
    folder = resolve_folder(folder)
    if not folder.is_dir():
        raise InputError(f"policy folder {folder} does not exist")
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"policy folder {folder} holds a LoRA adapter: merge it first (peft's merge_and_unload)")
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing and (folder / "run.json").is_file():
        raise InputError(f"{folder} is a run's folder: write its policy with `revseg export {folder} --out HF_DIR`")
    if missing:
        raise InputError(f"policy folder {folder} lacks {', '.join(missing)}")
    config = read_config(folder)
    if config.text.tie_word_embeddings and embeddings_differ(folder):
        config = replace(config, text=replace(config.text, tie_word_embeddings=False))
    chain = read_chain(folder)
    tokenizer = load_tokenizer(folder)
    # Abstract first: no random parameters are ever made.
    placement = place(mesh, axes) if mesh is not None else None
    choice = AttentionChoice(attention, placement)
    policy = nnx.eval_shape(
        lambda: Policy(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), remat=remat, attention=choice)
    )
    stored_dtype = load_weights(folder, policy, param_dtype, placement)
    return LoadedPolicy(policy, tokenizer, chain, folder, stored_dtype, placement, tuple(lengths))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    # Not AutoTokenizer, which imports torch: seconds at every start.
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise InputError(f"tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None


def read_chain(folder: Path) -> ChainConfig | None:
    """chain.yaml of a policy folder, or None without one."""
    path = folder / "chain.yaml"
    if not path.exists():
        return None
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ChainConfig), OmegaConf.load(path)))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {yaml_fault(error)}") from None
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None


def check_new(folder: AnyPath) -> None:
    """Raises InputError for a folder that `save_policy` would refuse."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already: give a new folder to save the policy into")


def save_policy(
    policy: Policy,
    folder: str | Path,
    source_folder: str | Path | None = None,
    chain: ChainConfig | None = None,
    dtype: str | None = None,
) -> None:
    """Writes a folder that `load_policy` and transformers load.

    source_folder ("embedded" too): where tokenizer and processor files are copied from, and config.json when it
    describes this policy. dtype: of the stored weights, default that of the parameters. The folder appears complete or
    not at all; one that exists and is not empty is an InputError. A full disk or unwritable place is a RunFailure.
    Of several processes all must call it, and the first one writes.
    """
    folder, dtype = path_of(folder), dtype or str(policy.text.embedding.dtype)
    source = resolve_folder(source_folder) if source_folder is not None else None
    if problem := agree(leads() and unfit(folder, source)):
        raise InputError(problem)
    if not leads():
        save_weights(policy, Path(), dtype)  # gives its parts
    elif is_remote(folder):
        with tempfile.TemporaryDirectory() as local:
            write_policy(policy, Path(local) / "policy", source, chain, dtype)
            upload(Path(local) / "policy", folder, last="config.json")
    else:
        write_policy(policy, folder, source, chain, dtype)


def unfit(folder: AnyPath, source: Path | None) -> str | None:
    """Why a policy cannot be saved there with the files of `source`; None when it can."""
    try:
        check_new(folder)
    except InputError as error:
        return str(error)
    missing = [name for name in TOKENIZER if source is not None and not (source / name).is_file()]
    return f"{source} lacks {', '.join(missing)}, which the saved policy needs" if missing else None


def write_policy(policy: Policy, folder: Path, source: Path | None, chain: ChainConfig | None, dtype: str) -> None:
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        for name in COPIED:
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        (partial / "config.json").write_text(json.dumps(config_json(policy, source, dtype), indent=2) + "\n")
        if chain is not None:
            (partial / "chain.yaml").write_text(to_yaml(chain))
        save_weights(policy, partial, dtype)
        partial.rename(folder)  # replaces an empty folder
    except OSError as error:
        raise RunFailure(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def config_json(policy: Policy, source: Path | None, dtype: str) -> dict:
    """The source's own config.json when it describes this policy, with the type of the weights as they are stored, and
    the embeddings untied where the source's files held two matrices in spite of it."""
    raw = to_hf(policy.config)
    if source is not None and (source / "config.json").is_file():
        original, tied = json.loads((source / "config.json").read_text()), policy.config.text.tie_word_embeddings
        if from_hf(original).text.tie_word_embeddings and not tied:
            original = {**original, "tie_word_embeddings": False}
            if "tie_word_embeddings" in (original.get("text_config") or {}):
                original["text_config"] = {**original["text_config"], "tie_word_embeddings": False}
        raw = original if from_hf(original) == policy.config else raw
    return {**raw, ("torch_dtype" if "torch_dtype" in raw else "dtype"): dtype}
