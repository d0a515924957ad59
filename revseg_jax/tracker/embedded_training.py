"""Trains the embedded tracker from scratch on synthetic clips: `revseg make-assets tracker`."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from sam2.sam2_video_predictor import SAM2VideoPredictor
from torch.utils.data import DataLoader
from tqdm import tqdm

from revseg_jax.errors import InputError
from revseg_jax.tracker import embedded_scores
from revseg_jax.tracker.model import EMBEDDED, build_tracker
from revseg_jax.tracker.training_data import Phase, Steps, make_batch
from revseg_jax.tracker.training_start import foreground_heads, foreground_loss, initialise, learn_boxes
from revseg_jax.tracker.training_step import Batch, encode, mask_loss, segment_frames, track

# Single frames come first: until a box gives a mask, there is nothing to track.
SCHEDULE = (
    Phase(until=0.15, clips=2, length=4, tracked=False, foreground=1.0, forced=1.0),
    Phase(until=0.35, clips=2, length=4, tracked=True, foreground=0.5, forced=1.0),
    Phase(until=0.85, clips=2, length=8, tracked=True, foreground=0.0, forced=0.5),
    Phase(until=1.00, clips=2, length=12, tracked=True, foreground=0.0, forced=0.0),
)
BOX_STEPS = 300  # before the schedule
STEPS_PER_MINUTE = 60  # a little under what one core does; only there to turn minutes into steps
LEARNING_RATE = 1e-3
WARMUP_STEPS = 50
SCORED_CLIPS = 100


def train_tracker(out: Path, seed: int = 0, minutes: float = 40.0, scored_clips: int = SCORED_CLIPS) -> dict:
    """Writes tracker.yaml, tracker.safetensors (float16) and asset.json to the folder `out`; returns the latter.

    minutes: nominal; round(60 * minutes) steps are taken however long they last. The same seed and minutes give the
    same weights on the same kind of machine. From a J of 0.6 on, the best weights so far are written along the way.
    """
    torch.set_num_threads(1)  # the tensors are small, and the order of additions stays the same
    torch.manual_seed(seed)
    if not 0 < minutes < math.inf:
        raise InputError(f"--minutes {minutes:g} is no number above 0")
    steps = max(1, round(minutes * STEPS_PER_MINUTE))
    model = build_tracker(EMBEDDED / "tracker.yaml", None).train()
    initialise(model, make_batch(seed, steps, SCHEDULE[0], model.image_size).frames.flatten(0, 1))
    learn_boxes(model, min(BOX_STEPS, steps), seed)
    heads = foreground_heads(model)
    optimizer = new_optimizer(model, heads)
    phases = [_phase(step, steps) for step in range(steps)]
    loader = DataLoader(
        Steps(seed, phases, model.image_size),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",  # a fork stops the threads that gRPC and JAX have by then
        prefetch_factor=8,
        persistent_workers=True,
    )
    recipe = {
        "command": f"revseg make-assets tracker --seed {seed} --minutes {minutes:g}",
        "seed": seed,
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "schedule": [asdict(phase) for phase in SCHEDULE],
    }
    best = 0.6
    bar = tqdm(loader, "training the tracker", total=steps)
    for step, batch in enumerate(bar):
        learning_rate = _learning_rate(step, steps)
        rng, phase = np.random.default_rng([seed, step, 1]), phases[step]
        losses = train_step(model, heads, optimizer, batch, phase, learning_rate, rng)
        if step % 10 == 0:
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
        if (step + 1) % max(50, steps // 10) == 0 and step + 1 < steps:
            model.eval()
            scores = {"easy": embedded_scores.score(model, "easy", 8, progress=False)}
            model.train()
            bar.write(f"step {step + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores["easy"].items()))
            if scores["easy"]["j"] > best:
                best = scores["easy"]["j"]
                _export(model, out, recipe | {"unfinished": f"step {step + 1} of {steps}"}, scores)
    final = _rounded(model)
    scores = {name: embedded_scores.score(final, name, scored_clips) for name in ("easy", "medium")}
    return _export(model, out, recipe, scores)


def new_optimizer(model: SAM2VideoPredictor, heads: torch.nn.ModuleList) -> torch.optim.Optimizer:
    parameters = [*model.parameters(), *heads.parameters()]
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)


def train_step(
    model: SAM2VideoPredictor,
    heads: torch.nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    phase: Phase,
    learning_rate: float,
    rng: np.random.Generator,
) -> dict[str, float]:
    """One update on a batch; returns its losses.

    Box to mask on single frames stays in the loss throughout: the mask on the keyframe bounds all that follows from it.
    """
    features = encode(model, batch.frames)
    visible = batch.boxes.any(2).nonzero()  # (object, frame)
    chosen = torch.from_numpy(rng.permutation(len(visible))[: 16 if phase.tracked else 32])
    objects, times = visible[chosen].unbind(1)
    losses = {"frame": mask_loss(segment_frames(model, features, batch, objects, times), batch.masks[objects, times])}
    total = losses["frame"] * (0.5 if phase.tracked else 1.0)
    if phase.tracked:
        present = batch.masks.flatten(2).any(2) if rng.random() < phase.forced else None
        losses["track"] = mask_loss(track(model, features, batch, present), batch.masks.transpose(0, 1).flatten(0, 1))
        total = total + losses["track"]
    if phase.foreground:
        total = total + phase.foreground * foreground_loss(heads, features, batch.foreground)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return {name: value.item() for name, value in losses.items()}


def _phase(step: int, steps: int) -> Phase:
    return next(phase for phase in SCHEDULE if step < phase.until * steps or phase is SCHEDULE[-1])


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, constant until 40 % of the steps, then half a cosine down to zero."""
    progress = max(0.0, step / steps - 0.4) / 0.6
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))


def _half(model: SAM2VideoPredictor) -> dict[str, torch.Tensor]:
    return {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}


def _rounded(model: SAM2VideoPredictor) -> SAM2VideoPredictor:
    """The model as it will be read back: with float16 weights. Changes the model itself."""
    model.load_state_dict(_half(model))
    return model.eval()


def _export(model: SAM2VideoPredictor, out: Path, recipe: dict, scores: dict) -> dict:
    """Writes the three files, each under a temporary name first; the weights go last but for the note about them."""
    out.mkdir(parents=True, exist_ok=True)
    weights = save(_half(model))
    note = recipe | {"sha256": hashlib.sha256(weights).hexdigest(), "scores": scores}
    config = (EMBEDDED / "tracker.yaml").read_bytes()
    for name, content in (
        ("tracker.yaml", config),
        ("tracker.safetensors", weights),
        ("asset.json", (json.dumps(note, indent=2) + "\n").encode()),
    ):
        temporary = out / f"{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(out / name)
    return note
