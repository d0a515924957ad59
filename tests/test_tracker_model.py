"""The embedded tracker and its training: weights load strictly, masks are good, learning learns."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from revseg_jax.errors import InputError
from revseg_jax.tracker import embedded_scores, embedded_training
from revseg_jax.tracker.model import EMBEDDED, build_tracker, fingerprint
from revseg_jax.tracker.training_data import Phase, box_of, jittered_box, make_batch
from revseg_jax.tracker.training_start import foreground_heads, initialise, learn_boxes
from revseg_jax.tracker.training_step import encode, track

CLIPS = Phase(until=1.0, clips=1, length=4, tracked=True, foreground=0.0, forced=1.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tracker():
    return build_tracker()


@pytest.fixture(scope="module")
def batch():
    return make_batch(seed=3, step=0, phase=CLIPS, size=128)


def test_embedded_weights_are_those_of_the_note(tracker):
    note = json.loads((EMBEDDED / "asset.json").read_text())
    assert hashlib.sha256((EMBEDDED / "tracker.safetensors").read_bytes()).hexdigest() == note["sha256"]
    stored = load_file(EMBEDDED / "tracker.safetensors")
    assert not tracker.training and sum(p.numel() for p in tracker.parameters()) < 2e6
    for name, value in tracker.state_dict().items():
        assert value.dtype == torch.float32 and stored[name].dtype == torch.float16
        torch.testing.assert_close(value, stored[name].float(), rtol=0, atol=0)


def test_scores_of_the_note_meet_the_requirement():
    scores = json.loads((EMBEDDED / "asset.json").read_text())["scores"]
    assert scores["easy"]["clips"] >= 50 and scores["easy"]["j"] >= 0.78


def test_embedded_tracker_on_held_out_clips(tracker):
    scores = embedded_scores.score(tracker, "easy", clips=6, progress=False)
    assert scores["j"] > 0.7
    assert scores["j"] > scores["copy"] + 0.2


def test_wrong_box_gives_wrong_masks(tracker):
    good = embedded_scores.score(tracker, "easy", clips=3, enlarge=0.0, progress=False)
    loose = embedded_scores.score(tracker, "easy", clips=3, enlarge=0.8, progress=False)
    assert loose["j"] < good["j"] - 0.1


@pytest.mark.parametrize("name, millions", [("sam2.1_hiera_t", 38.96), ("sam2_hiera_t", 38.95)])
def test_published_configs_build(name, millions):
    model = build_tracker(name, None)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert model.image_size == 1024


def test_checkpoint_in_the_published_layout(tracker, tmp_path):
    torch.save({"model": tracker.state_dict()}, tmp_path / "tiny.pt")
    (tmp_path / "tiny.yaml").write_bytes((EMBEDDED / "tracker.yaml").read_bytes())
    again = build_tracker(checkpoint=tmp_path / "tiny.pt")  # its config is found beside it
    for name, value in tracker.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    assert fingerprint(again, "embedded", tmp_path / "tiny.pt") == fingerprint(tracker, "embedded", "embedded")


def test_fingerprints_tell_trackers_apart(tracker, tmp_path):
    """By one digit of one weight, or by a number of the config that no weight shows."""
    known = fingerprint(tracker, "embedded", "embedded")
    tensors = {name: value.clone() for name, value in tracker.state_dict().items()}
    bias = tensors["sam_mask_decoder.iou_prediction_head.layers.0.bias"]
    bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "other.safetensors")
    other = build_tracker(EMBEDDED / "tracker.yaml", tmp_path / "other.safetensors")
    tree = yaml.safe_load((EMBEDDED / "tracker.yaml").read_text())
    tree["model"]["max_obj_ptrs_in_encoder"] += 1
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(tree))
    longer = build_tracker(tmp_path / "longer.yaml")
    different = {
        known,
        fingerprint(other, EMBEDDED / "tracker.yaml", tmp_path / "other.safetensors"),
        fingerprint(longer, tmp_path / "longer.yaml", "embedded"),
    }
    assert len(different) == 3


def _broken(tmp_path: Path, kind: str) -> Path:
    tensors = load_file(EMBEDDED / "tracker.safetensors")
    path = tmp_path / "broken.safetensors"
    if kind == "missing":
        del tensors["no_mem_embed"]
    elif kind == "unexpected":
        tensors["surplus"] = torch.zeros(1)
    elif kind == "shape":
        tensors["no_mem_embed"] = torch.zeros(2)
    save_file(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    return path


@pytest.mark.parametrize(
    "kind, said",
    [
        ("missing", "missing: no_mem_embed"),
        ("unexpected", "unexpected: surplus"),
        ("shape", "another shape: no_mem_embed"),
        ("truncated", "cannot be read"),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, kind, said):
    path = _broken(tmp_path, kind)
    with pytest.raises(InputError) as error:
        build_tracker(EMBEDDED / "tracker.yaml", path)
    message = str(error.value)
    assert said in message and str(path) in message and "\n" not in message


def test_a_checkpoint_without_a_config_is_named_and_not_the_config(tmp_path):
    path = tmp_path / "mine.pt"
    with pytest.raises(InputError, match=f"^tracker checkpoint {path} does not exist$"):
        build_tracker(checkpoint=path)
    path.touch()
    with pytest.raises(InputError, match=f"^the config of {path} is unknown: neither mine.yaml beside it nor a publ"):
        build_tracker(checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip", b"\x80\x02cos\nsystem\n(S'false'\ntR."])
def test_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        build_tracker(EMBEDDED / "tracker.yaml", path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "does not exist"),
        ("a: [", "cannot be read"),
        ("a: 1", "no section `model`"),
        ("model: {image_encoder: {_target_: os.system, command: 'false'}}", "not a class of sam2.modeling"),
        ("model: {image_size: 128}", "does not describe a SAM2 model"),
        ("model: {image_size: '${nowhere}'}", "nowhere"),
    ],
)
def test_config_that_is_none(tmp_path, text, said):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        build_tracker(path, None)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_training_pass_equals_the_predictor(tracker, batch):
    """What is trained is what runs: the masks of a training pass are those of the predictor's public calls."""
    keyframe, frames = batch.keyframe, batch.frames[0].numpy()
    boxes, truths = batch.boxes[:, keyframe].numpy(), batch.masks.numpy()
    prompts = [embedded_scores.Prompt(keyframe, *pair) for pair in zip(boxes, truths, strict=True)]
    expected = np.stack(list(embedded_scores.predict(tracker, frames, prompts)), 1).reshape(-1, 128, 128)
    with torch.inference_mode():
        decoded = track(tracker, encode(tracker, batch.frames), batch)
        logits = torch.where(decoded.score[..., None, None] > 0, decoded.masks, -1024.0)
        got = torch.nn.functional.interpolate(logits, size=(128, 128), mode="bilinear")[:, 0] > 0
    # The predictor rounds memories to bfloat16; only pixels on the boundary may differ.
    assert (got.numpy() != expected).mean() < 2e-3 and expected.any()


def test_batches_follow_from_seed_and_step(batch):
    again = make_batch(seed=3, step=0, phase=CLIPS, size=128)
    other = make_batch(seed=3, step=1, phase=CLIPS, size=128)
    assert torch.equal(batch.frames, again.frames) and torch.equal(batch.boxes, again.boxes)
    assert not torch.equal(batch.frames, other.frames)
    assert batch.masks[:, batch.keyframe].flatten(1).any(1).all()


def test_boxes():
    mask = np.zeros((20, 30), bool)
    mask[4:9, 10:12] = True
    assert box_of(mask).tolist() == [10, 4, 12, 9]
    rng = np.random.default_rng(0)
    moved = np.stack([jittered_box(np.array([10.0, 4, 30, 14]), 0.06, (20, 30), rng) for _ in range(500)])
    assert (np.abs(moved[:, :3] - [10, 4, 30]) <= [3, 1.5, 3]).all() and moved[:, 2].max() <= 30
    np.testing.assert_allclose(moved[:, :2].std(0), [1.2, 0.6], rtol=0.15)  # 6 % of the sides 20 and 10


@pytest.mark.parametrize("tracked", [False, True])
def test_training_lowers_the_loss_on_a_fixed_batch(batch, tracked):
    torch.manual_seed(0)
    model = build_tracker(EMBEDDED / "tracker.yaml", None).train()
    heads = foreground_heads(model)
    optimizer = embedded_training.new_optimizer(model, heads)
    phase = dataclasses.replace(CLIPS, tracked=tracked, foreground=1.0)
    losses = []
    for _ in range(10):
        rng = np.random.default_rng(0)
        losses.append(embedded_training.train_step(model, heads, optimizer, batch, phase, 1e-3, rng))
    for name, first in losses[0].items():
        assert losses[-1][name] < 0.8 * first, name


def test_start_gives_images_and_boxes_their_weight(batch):
    torch.manual_seed(0)
    model = build_tracker(EMBEDDED / "tracker.yaml", None).train()
    initialise(model, batch.frames[0])
    for level in encode(model, batch.frames).maps[:2]:
        assert level.std((0, 1, 3, 4)).mean().item() == pytest.approx(1, abs=0.2)
    assert learn_boxes(model, 25, seed=0) < learn_boxes(build_tracker(EMBEDDED / "tracker.yaml", None), 1, seed=0)


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), 0, -1])
def test_minutes_are_above_0(tmp_path, minutes):
    with pytest.raises(InputError, match="is no number above 0"):
        embedded_training.train_tracker(tmp_path, minutes=minutes)


def test_command_writes_a_tracker_that_follows_from_its_seed(tmp_path):
    # 0.05 nominal minutes are 3 steps, one of each kind.
    notes = [embedded_training.train_tracker(tmp_path / name, seed=1, minutes=0.05, scored_clips=1) for name in "ab"]
    assert notes[0] == notes[1] == json.loads((tmp_path / "a" / "asset.json").read_text())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "asset.json",
        "tracker.safetensors",
        "tracker.yaml",
    ]
    assert "unfinished" not in notes[0] and notes[0]["steps"] == 3
    build_tracker(checkpoint=tmp_path / "b" / "tracker.safetensors")
