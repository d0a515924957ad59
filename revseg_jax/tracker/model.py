"""Builds SAM2 video predictors: the embedded tiny one, the published SAM2 and SAM2.1 ones, or any other config.

The classes are those of the `sam2` package. Its own builder looks configs up through hydra's global search path; this
one reads a YAML file from anywhere and leaves hydra's global state alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import sam2
import torch
import yaml
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from sam2.sam2_video_predictor import SAM2VideoPredictor

from revseg_jax.errors import InputError

EMBEDDED = Path(__file__).parents[1] / "assets" / "tracker"  # tracker.yaml, tracker.safetensors, asset.json
_STOCK_FOLDER = Path(sam2.__file__).parent / "configs"
_STOCK_SIZES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
# Names of the published configs, e.g. sam2.1_hiera_t, and of the published checkpoints, e.g. sam2.1_hiera_tiny.pt
_STOCK_CONFIGS = {
    f"{family}_hiera_{letter}": _STOCK_FOLDER / family / f"{family}_hiera_{letter}.yaml"
    for family in ("sam2", "sam2.1")
    for letter in _STOCK_SIZES.values()
}
_STOCK_CHECKPOINTS = {
    f"{family}_hiera_{size}": _STOCK_CONFIGS[f"{family}_hiera_{letter}"]
    for family in ("sam2", "sam2.1")
    for size, letter in _STOCK_SIZES.items()
}


def build_tracker(
    config: str | Path = "embedded",
    checkpoint: str | Path | None = "embedded",
    device: str | torch.device = "cpu",
) -> SAM2VideoPredictor:
    """A SAM2 video predictor in eval mode on `device`, as SAM2 itself is evaluated: without the post-processing that
    `sam2.build_sam.build_sam2_video_predictor` adds by default and SAM2's tools/vos_inference.py leaves out. One's own
    config may ask for its parts, but for filled holes, which need a compiled extension.

    config: "embedded", the name of a published config (sam2_hiera_{t,s,b+,l}, sam2.1_hiera_{t,s,b+,l}) or a YAML file.
        Left at "embedded" with a checkpoint of one's own, the config is found from the checkpoint: the YAML file of the
        same name beside it, or the published config if the file has a published checkpoint's name.
    checkpoint: "embedded", a .safetensors file, a .pt file as published (a dict with the entry "model"), or None for
        random weights. Every tensor must be there and none may be left over.

    Raises InputError in one line if the config or the checkpoint is missing, unreadable or does not fit.
    """
    path = _config_path(config, checkpoint)
    predictor = _instantiate(path)
    if checkpoint is not None:
        file = EMBEDDED / "tracker.safetensors" if checkpoint == "embedded" else Path(checkpoint)
        _load_strictly(predictor, _read_tensors(file), file, path)
    return predictor.to(device).eval()


def fingerprint(model: torch.nn.Module, config: str | Path, checkpoint: str | Path | None) -> str:
    """SHA-256, in hexadecimal, of the parameters of a model and of the config that it was built from: whatever their
    files are called, two trackers with the same fingerprint are the same function. config, checkpoint: as given to
    `build_tracker`."""
    tree = OmegaConf.to_container(OmegaConf.load(_config_path(config, checkpoint)), resolve=True)
    content = hashlib.sha256(json.dumps(tree["model"], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def _config_path(config: str | Path, checkpoint: str | Path | None) -> Path:
    if config != "embedded":
        path = _STOCK_CONFIGS.get(str(config), Path(config))
    elif checkpoint in ("embedded", None):
        path = EMBEDDED / "tracker.yaml"
    else:
        if not Path(checkpoint).is_file():
            raise InputError(f"tracker checkpoint {checkpoint} does not exist")
        beside = Path(checkpoint).with_suffix(".yaml")
        path = beside if beside.is_file() else _STOCK_CHECKPOINTS.get(Path(checkpoint).stem)
    if path is None or not path.is_file():
        fault = f"tracker config {path} does not exist"
        if path is None:
            fault = f"the config of {checkpoint} is unknown: neither {beside.name} beside it nor a published name"
        raise InputError(f"{fault}; give a YAML file or one of {', '.join(sorted(_STOCK_CONFIGS))}")
    return path


def _instantiate(path: Path) -> SAM2VideoPredictor:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"tracker config {path} cannot be read: {_first_line(error)}") from None
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        raise InputError(f"tracker config {path} has no section `model`; it must be a SAM2 config")
    _allow_only_sam2(model, path)
    model["_target_"] = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    try:
        return instantiate(OmegaConf.create(model), _recursive_=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"tracker config {path} does not describe a SAM2 model: {_first_line(error)}") from None


def _allow_only_sam2(node: object, path: Path) -> None:
    """A config names the classes to call; anything outside the sam2 package would be code from a data file."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and not str(target).startswith("sam2.modeling."):
            if str(target) != "sam2.sam2_video_predictor.SAM2VideoPredictor":
                raise InputError(f"tracker config {path}: _target_ {target} is not a class of sam2.modeling")
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            _allow_only_sam2(child, path)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise InputError(f"tracker checkpoint {file} does not exist")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"tracker checkpoint {file} cannot be read: {_first_line(error)}") from None
    except MemoryError:
        raise
    except Exception as error:  # torch.load has no common error class: pickle, zip, key and runtime errors all occur
        # Not in its words, which advise to load what may be code.
        kind = type(error).__name__
        raise InputError(f"tracker checkpoint {file} is not a PyTorch checkpoint of tensors ({kind})") from None
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"tracker checkpoint {file} holds no tensors by name (expected a dict with the entry `model`)")
    return content


def _load_strictly(model: torch.nn.Module, tensors: dict[str, torch.Tensor], file: Path, config: Path) -> None:
    expected = {name: value.shape for name, value in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": sorted(n for n in expected.keys() & tensors.keys() if expected[n] != tensors[n].shape),
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise InputError(f"tracker checkpoint {file} does not fit config {config}: tensors {text}")
    model.load_state_dict(tensors)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
