"""The policy against transformers' torch Qwen2.5-VL over random configurations: the specification of the policy."""

from __future__ import annotations

from operator import itemgetter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch_policy import (
    IMAGE,
    TEXT_TOKENS,
    VIDEO,
    conversation,
    encode_alone,
    encode_patches,
    load_ours,
    quick_jit,
    random_model,
)
from transformers import Qwen2_5_VLTextConfig, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel, Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from revseg_jax.data.frames import resize_square
from revseg_jax.policy.attention import AttentionChoice
from revseg_jax.policy.config import TextConfig, VisionConfig
from revseg_jax.policy.embedded_tokenizer import write_preprocessor
from revseg_jax.policy.hf_weights import published_name, to_stored, weights_of
from revseg_jax.policy.model import Policy, PrefixTokens, chunked_logprobs
from revseg_jax.policy.preprocess import patchify
from revseg_jax.policy.rope import decoder_rotation, sequence_positions
from revseg_jax.policy.text import Prefix, empty_suffix_cache

SEEDS = [0, 1, 2, 3]
# In patches; windows are 2 or 3 merged patches wide, so borders are uneven. One row is smaller than a window.
GRIDS = [(2, 10, 6), (1, 2, 14), (1, 8, 8)]


@pytest.fixture(scope="module", params=SEEDS)
def pair(request, tmp_path_factory):
    """(torch model, our policy with the same weights) of one random configuration."""
    model = random_model(request.param)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, load_ours(folder)


@pytest.fixture(scope="module")
def first_pair(tmp_path_factory):
    model = random_model(10)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, load_ours(folder)


def whole_hidden(policy: Policy, tokens, positions, features):
    """tokens [L], positions [3, L], features [V, hidden] -> final-normed hidden [L, hidden]."""
    return policy.prefix_forward(tokens[None], positions[:, None], features[None])[0][0]


whole_forward = quick_jit(whole_hidden)


def torch_logits(model, talk) -> np.ndarray:
    with torch.no_grad():
        return model(**talk.torch_inputs()).logits[0].numpy()


def test_the_drawn_configurations_differ():
    models = [random_model(seed) for seed in SEEDS]
    texts = [model.config.text_config for model in models]
    assert len({text.num_attention_heads // text.num_key_value_heads for text in texts}) > 1
    assert len({model.config.vision_config.window_size for model in models}) > 1
    assert {model.config.tie_word_embeddings for model in models} == {False, True}


def test_vision_tower(pair):
    model, policy = pair
    rng = np.random.default_rng(0)
    for grid in GRIDS:
        patches = rng.normal(size=(grid[0], grid[1] * grid[2], policy.config.vision.patch_dim)).astype(np.float32)
        with torch.no_grad():
            flat = torch.tensor(patches.reshape(-1, patches.shape[-1]))
            expected = model.model.visual(flat, grid_thw=torch.tensor([grid])).pooler_output.numpy()
        ours = np.asarray(encode_alone(policy, patches, grid[1], grid[2])).reshape(expected.shape)
        assert 0.3 < expected.std() < 3
        np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_logits_of_two_turns_with_a_video_and_an_image(pair):
    model, policy = pair
    rng = np.random.default_rng(1)
    talk = conversation(rng, policy.config, 4, (3, 6, 10), 9, (0, 10, 6), 5)
    hidden = whole_forward(policy, talk.tokens, talk.positions(policy.config), talk.features(policy))
    expected = torch_logits(model, talk)
    assert 0.3 < expected.std() < 3
    np.testing.assert_allclose(policy.text.logits(hidden), expected, atol=2e-4)


def test_every_decoder_layers_output(pair):
    model, policy = pair
    talk = conversation(np.random.default_rng(8), policy.config, 3, (2, 6, 6), 5)
    expected = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: expected.append(output[0].numpy()))
        for layer in model.model.language_model.layers
    ]
    torch_logits(model, talk)
    [hook.remove() for hook in hooks]
    features, positions = talk.features(policy), talk.positions(policy.config)

    @quick_jit
    def outputs(state):
        found, layers = [], state["text"]["layers"]
        for count in range(1, len(expected) + 1):
            state["text"]["layers"] = jax.tree.map(itemgetter(slice(count)), layers)
            first = nnx.merge(graphdef, state)
            first.text.norm = lambda x: x  # what the last of these layers returns, not the final-normed hidden
            found.append(whole_hidden(first, talk.tokens, positions, features))
        return found

    graphdef, state = nnx.split(policy)
    for ours, theirs in zip(outputs(state), expected, strict=True):
        assert 0.3 < theirs.std() < 10
        np.testing.assert_allclose(ours, theirs.reshape(ours.shape), atol=2e-4)


def test_bfloat16_is_as_close_to_float32_as_torchs_own(tmp_path):
    """Both as the largest distance and in the mean square, over several conversations."""
    model = random_model(12)
    model.save_pretrained(tmp_path)
    policy, rng = load_ours(tmp_path, "bfloat16"), np.random.default_rng(9)
    talks = [conversation(rng, policy.config, 4, (2, 6, 8), 9 + part, (0, 6, 4), 5) for part in (0, 0, 0)]
    exact = [torch_logits(model, talk) for talk in talks]
    model = model.to(torch.bfloat16)
    theirs, ours = [], []
    for talk, reference in zip(talks, exact, strict=True):
        inputs = {k: v.bfloat16() if k.startswith("pixel") else v for k, v in talk.torch_inputs().items()}
        with torch.no_grad():
            theirs.append(model(**inputs).logits[0].float().numpy() - reference)
        hidden = whole_forward(policy, talk.tokens, talk.positions(policy.config), talk.features(policy))
        assert hidden.dtype == jnp.bfloat16
        ours.append(np.asarray(policy.text.logits(hidden)) - reference)
    assert np.std(theirs) > 1e-3
    assert np.std(ours) <= 3 * np.std(theirs) and np.abs(ours).max() <= 3 * np.abs(theirs).max()


def test_shared_prefix_equals_separate_sequences(pair):
    """B prompts x G rollouts over static slots against B x G unpadded sequences in torch."""
    model, policy = pair
    rollouts = rollout_batch(policy, np.random.default_rng(2))
    hidden = quick_jit(shared_prefix_hidden)(policy, rollouts.arrays)
    logits = np.asarray(policy.text.logits(hidden))
    for prompt in range(2):
        for group in range(3):
            expected = torch_logits(model, rollouts.talks[prompt][group])[rollouts.prefix_lengths[prompt] :]
            real = rollouts.arrays["mask"][prompt, group]
            np.testing.assert_allclose(logits[prompt, group][real], expected, atol=2e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_decoding_token_by_token_equals_the_whole_forward(first_pair, platform, monkeypatch):
    """On a CPU layers are run one after the other, elsewhere a loop runs over them; both are tried here."""
    monkeypatch.setattr(AttentionChoice, "platform", platform)
    _, policy = first_pair
    arrays = rollout_batch(policy, np.random.default_rng(3)).arrays
    whole = quick_jit(shared_prefix_hidden)(policy, arrays)
    before = PrefixTokens(*(arrays[f"prefix_{key}"] for key in ("tokens", "positions", "mask", "video")))
    prefix = quick_jit(Policy.prefill)(policy, before).cache()
    x = policy.embed(arrays["tokens"], arrays["image"])
    prompts, groups, slots = arrays["mask"].shape
    cache = empty_suffix_cache(policy.config.text, prompts, groups, slots, jnp.float32)

    @quick_jit
    def step(policy, x, positions, real, slot, cache):
        rotation = decoder_rotation(policy.config.text, positions, x.dtype)
        return policy.text.extend(x, rotation, real, slot, policy.text.layer_inputs(prefix), prefix.mask, cache)

    for slot in range(slots):
        here = slice(slot, slot + 1)
        real = arrays["mask"][:, :, here]
        hidden, cache = step(policy, x[:, :, here], arrays["positions"][..., here], real, slot, cache)
        np.testing.assert_allclose(hidden[real], whole[:, :, here][real], atol=3e-5)
    np.testing.assert_array_equal(cache.mask, arrays["mask"])
    # Several tokens at once, as turn 2's prompt is appended.
    half = slots // 2
    empty = empty_suffix_cache(policy.config.text, prompts, groups, slots, jnp.float32)
    parts = []
    for here in (slice(0, half), slice(half, slots)):
        hidden, empty = step(
            policy, x[:, :, here], arrays["positions"][..., here], arrays["mask"][:, :, here], here.start, empty
        )
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 2)[arrays["mask"]], whole[arrays["mask"]], atol=3e-5)


def test_greedy_decoding_equals_generate(first_pair):
    model, policy = first_pair
    rng = np.random.default_rng(4)
    talk = conversation(rng, policy.config, 3, (2, 6, 8), 60)
    # Our sampler never lets the model say a visual token; neither may the oracle.
    banned = [number for number in range(TEXT_TOKENS, model.config.text_config.vocab_size)]
    expected = model.generate(
        **talk.torch_inputs(), max_new_tokens=64, do_sample=False, suppress_tokens=banned, eos_token_id=None
    )[0, len(talk.tokens) :].tolist()
    positions = talk.positions(policy.config)
    hidden, keys, values = quick_jit(Policy.prefix_forward)(
        policy, talk.tokens[None], positions[:, None], talk.features(policy)[None]
    )
    prefix = Prefix(keys, values, jnp.ones((1, len(talk.tokens)), bool)).cache()
    cache = empty_suffix_cache(policy.config.text, 1, 1, 64, jnp.float32)

    @quick_jit
    def step(policy, token, position, slot, cache):
        x = policy.embed(token.reshape(1, 1, 1))
        real = jnp.ones((1, 1, 1), bool)
        rotation = decoder_rotation(policy.config.text, jnp.full((3, 1, 1, 1), position), x.dtype)
        inputs = policy.text.layer_inputs(prefix)
        hidden, cache = policy.text.extend(x, rotation, real, slot, inputs, prefix.mask, cache)
        return jnp.argmax(policy.text.logits(hidden)[0, 0, 0, :TEXT_TOKENS]), cache

    ours = [int(jnp.argmax(policy.text.logits(hidden[0, -1])[:TEXT_TOKENS]))]
    for slot in range(63):
        token, cache = step(policy, jnp.int32(ours[-1]), positions[0, -1] + 1 + slot, slot, cache)
        ours.append(int(token))
    assert ours == expected
    assert len(set(ours)) > 3


def test_gradients_of_every_parameter(pair):
    model, policy = pair
    rng = np.random.default_rng(5)
    talk = conversation(rng, policy.config, 3, (2, 6, 6), 7, (0, 4, 6), 6)
    targets = rng.integers(0, TEXT_TOKENS, len(talk.tokens))
    weights = rng.normal(size=len(targets)).astype(np.float32)
    model.zero_grad()
    logprobs = torch.log_softmax(model(**talk.torch_inputs()).logits[0], -1)
    expected = (logprobs[range(len(targets)), targets] * torch.tensor(weights)).sum()
    expected.backward()
    graphdef, state = nnx.split(policy)
    positions = talk.positions(policy.config)

    def loss(state):
        policy = nnx.merge(graphdef, state)
        features = talk.features(policy, encode_patches)
        hidden = whole_hidden(policy, talk.tokens, positions, features)
        return jnp.sum(chunked_logprobs(policy, hidden, jnp.asarray(targets), 8)[0] * weights)

    value, gradients = quick_jit(jax.value_and_grad(loss))(state)
    assert value == pytest.approx(expected.item(), rel=1e-4)
    gradients = dict(nnx.to_flat_state(gradients))
    oracle = {published_name(name): parameter.grad.numpy() for name, parameter in model.named_parameters()}
    compared = set()
    for weight in weights_of(policy):
        gradient = np.asarray(gradients[weight.path][...])
        for name, layer in zip(weight.names, gradient if weight.stacked else [gradient], strict=True):
            error = np.linalg.norm(to_stored(weight, layer) - oracle[name]) / np.linalg.norm(oracle[name])
            assert error < 1e-4, (name, error)
            compared.add(name)
    assert compared == oracle.keys()


def test_shared_prefix_gradients_equal_separate_sequences_in_float64(tmp_path):
    model = random_model(11, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    with jax.enable_x64(True):
        policy = load_ours(tmp_path, "float64")
        rng = np.random.default_rng(6)
        rollouts = rollout_batch(policy, rng)
        arrays = rollouts.arrays
        weights = rng.normal(size=arrays["mask"].shape) * arrays["mask"]
        graphdef, state = nnx.split(policy)

        def shared(state):
            policy = nnx.merge(graphdef, state)
            patches = {key: jnp.asarray(rollouts.patches[key]) for key in ("video", "image")}
            inputs = {
                **arrays,
                "prefix_video": encode(policy, patches["video"]),
                "image": encode(policy, patches["image"]),
            }
            hidden = shared_prefix_hidden(policy, inputs)
            return jnp.sum(chunked_logprobs(policy, hidden, inputs["tokens"], 16)[0] * weights)

        def encode(policy, patches):
            """[..., slices, patches, dim] of one grid -> [..., tokens, hidden]"""
            *lead, _, count, dim = patches.shape
            height = rollouts.heights[count]
            out = policy.vision(jnp.asarray(patches, policy.dtype).reshape(-1, count, dim), height, count // height)
            return out.reshape(*lead, -1, out.shape[-1])

        def separate(state):
            """Six whole sequences, each with its own video and its own copy of the prefix, padded at the end."""
            policy, talks = nnx.merge(graphdef, state), sum(rollouts.talks, [])
            length = max(len(talk.tokens) for talk in talks)
            tokens = np.array([np.pad(talk.tokens, (0, length - len(talk.tokens))) for talk in talks])
            positions = [
                np.pad(talk.positions(policy.config), ((0, 0), (0, length - len(talk.tokens)))) for talk in talks
            ]
            videos, images = (np.stack([talk.patches[number] for talk in talks]) for number in (0, 1))
            features = jnp.concatenate([encode(policy, videos), encode(policy, images)], 1)
            hidden, _, _ = policy.prefix_forward(tokens, np.stack(positions, 1), features)
            logprobs = jax.nn.log_softmax(policy.text.logits(hidden))
            logprobs = jnp.take_along_axis(logprobs, tokens[..., None], 2)[..., 0]
            in_place = np.zeros((6, length))
            for row, talk in enumerate(talks):
                prompt, group = divmod(row, 3)
                generated = slice(rollouts.prefix_lengths[prompt], len(talk.tokens))
                in_place[row, generated] = weights[prompt, group][arrays["mask"][prompt, group]]
            return jnp.sum(logprobs * in_place)

        value, gradients = quick_jit(jax.value_and_grad(shared))(state)
        expected, oracle = quick_jit(jax.value_and_grad(separate))(state)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(oracle), strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())


def shared_prefix_hidden(policy: Policy, arrays: dict) -> jax.Array:
    prefix = PrefixTokens(*(arrays[f"prefix_{key}"] for key in ("tokens", "positions", "mask", "video")))
    return policy.suffix_hidden(prefix, *(arrays[key] for key in ("tokens", "positions", "mask", "image")))


def rollout_batch(policy: Policy, rng: np.random.Generator) -> SimpleNamespace:
    """2 prompts x 3 rollouts in the static layout: y1 padded, turn 2 with an image at a fixed offset, y2 padded.

    `talks[b][g]` is the same conversation without padding.
    """
    config = policy.config
    video_grid, image_grid = (2, 6, 8), (1, 10, 6)
    prefix_slots, y1_slots, y2_slots = 40, 6, 5
    image_tokens = image_grid[1] * image_grid[2] // 4
    turn2 = 2 + image_tokens + 2 + 3  # text, vision start, image, vision end, text
    slots = y1_slots + turn2 + y2_slots
    arrays = {
        "prefix_tokens": np.zeros((2, prefix_slots), np.int32),
        "prefix_positions": np.zeros((3, 2, prefix_slots), np.int32),
        "prefix_mask": np.zeros((2, prefix_slots), bool),
        "tokens": np.zeros((2, 3, slots), np.int32),
        "positions": np.zeros((3, 2, 3, slots), np.int32),
        "mask": np.zeros((2, 3, slots), bool),
    }
    talks, prefix_lengths, patches = [], [], {"video": [], "image": []}
    for prompt in range(2):
        before, after = 3 + prompt, 5 + 3 * prompt
        question = conversation(rng, config, before, video_grid, after)
        length = len(question.tokens)
        prefix_lengths.append(length)
        patches["video"].append(question.patches[0])
        assert length < prefix_slots
        arrays["prefix_tokens"][prompt, :length] = question.tokens
        arrays["prefix_mask"][prompt, :length] = True
        arrays["prefix_positions"][:, prompt, :length] = question.positions(config)
        talks.append([])
        patches["image"].append([])
        for group in range(3):
            y1, y2 = (int(rng.integers(1, top + 1)) for top in (y1_slots, y2_slots))
            answer = conversation(rng, config, y1 + 2, (0, *image_grid[1:]), 3 + y2)
            talk = question.__class__(
                np.concatenate([question.tokens, answer.tokens]),
                question.grids + answer.grids,
                question.is_video + answer.is_video,
                question.seconds,
                question.patches + answer.patches,
            )
            talks[-1].append(talk)
            patches["image"][-1].append(answer.patches[0])
            real = np.r_[0:y1, y1_slots : y1_slots + turn2, y1_slots + turn2 : y1_slots + turn2 + y2]
            arrays["mask"][prompt, group, real] = True
            arrays["tokens"][prompt, group, real] = answer.tokens
            arrays["positions"][:, prompt, group, real] = talk.positions(config)[:, length:]
    patches = {key: np.array(value) for key, value in patches.items()}
    arrays["prefix_video"] = jnp.stack(
        [encode_alone(policy, part, *video_grid[1:]).reshape(-1, config.text.hidden_size) for part in patches["video"]]
    )
    arrays["image"] = jnp.stack(
        [jnp.stack([encode_alone(policy, part, *image_grid[1:])[0] for part in row]) for row in patches["image"]]
    )
    heights = {grid[1] * grid[2]: grid[1] for grid in (video_grid, image_grid)}
    return SimpleNamespace(arrays=arrays, talks=talks, prefix_lengths=prefix_lengths, patches=patches, heights=heights)


visuals = st.tuples(st.booleans(), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 8.0))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 9), visuals), min_size=1, max_size=7),
    st.sampled_from([1, 2, 4, 25]),
    st.sampled_from([1, 2]),
)
def test_positions_equal_get_rope_index(pieces, tokens_per_second, merge):
    vision = SimpleNamespace(spatial_merge_size=merge, tokens_per_second=tokens_per_second)
    config = SimpleNamespace(vision=vision, image_token_id=IMAGE, video_token_id=VIDEO, vision_config=vision)
    tokens, grids, image_grids, video_grids, seconds = [], [], [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += [1] * piece
            continue
        is_video, time, height, width, duration = piece
        time = time if is_video else 1
        tokens += [2] + [VIDEO if is_video else IMAGE] * (time * height * width) + [3]
        grids.append((time, height * merge, width * merge))
        (video_grids if is_video else image_grids).append(grids[-1])
        seconds += [duration] if is_video else []
    ids = torch.tensor([tokens])
    oracle = SimpleNamespace(config=config)
    oracle.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(oracle)
    expected, _ = Qwen2_5_VLModel.get_rope_index(
        oracle,
        ids,
        ((ids == IMAGE) * 1 + (ids == VIDEO) * 2).int(),
        image_grid_thw=torch.tensor(image_grids) if image_grids else None,
        video_grid_thw=torch.tensor(video_grids) if video_grids else None,
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
    )
    ours = sequence_positions(np.array(tokens), config, grids, seconds)
    np.testing.assert_array_equal(ours, expected[:, 0].numpy())


@pytest.mark.parametrize(("theta", "width"), [(1e6, 128), (1e4, 128), (3000.0, 32)])
def test_rotary_tables_of_long_conversations(theta, width):
    """A frequency that is one unit of its last place off turns a late token's heads by a thousandth."""
    section = (width // 8, width // 8, width // 4)
    torch_config = Qwen2_5_VLTextConfig(
        hidden_size=2 * width,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "mrope_section": list(section)},
    )
    positions = np.arange(3)[:, None] * 1000 + np.arange(0, 30_000, 11)
    tables = Qwen2_5_VLRotaryEmbedding(torch_config)(torch.zeros(1), torch.tensor(positions)[:, None])
    text = TextConfig(8, 2 * width, 8, 1, 2, 2, width, theta, section, 1e-6, True)
    off = set()
    for ours, theirs in zip(decoder_rotation(text, jnp.asarray(positions), jnp.float32), tables, strict=True):
        distance = np.abs(np.asarray(ours) - theirs[0].numpy()).max(0)
        off |= set(np.flatnonzero(distance > 1e-6) % (width // 2))
    assert len(off) <= 1  # torch's own power misses its last digit somewhere


@pytest.mark.parametrize("patch", [14, 4])
def test_patches_equal_the_processors(tmp_path, patch):
    vision = VisionConfig(1, 8, 8, 1, 8, patch, 2, 2, 8 * patch, (0,), 2)
    write_preprocessor(vision, tmp_path)
    rng = np.random.default_rng(7)
    side = 6 * patch
    frames = rng.integers(0, 256, (4, side, side + 2 * patch, 3), dtype=np.uint8)
    processed = Qwen2VLVideoProcessor.from_pretrained(tmp_path)(
        torch.tensor(frames).permute(0, 3, 1, 2), return_tensors="pt"
    )
    assert processed["video_grid_thw"].tolist() == [[2, 6, 8]]
    expected = processed["pixel_values_videos"].numpy()
    np.testing.assert_array_equal(np.asarray(patchify(frames[None], vision)).reshape(expected.shape), expected)
    # An image stands twice in its temporal patch. The largest keyframe of the paper passes unresized too.
    for image in (frames[0], rng.integers(0, 256, (60 * patch, 60 * patch, 3), dtype=np.uint8)):
        processed = Qwen2VLImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")
        expected = processed["pixel_values"].numpy()
        ours = np.asarray(patchify(np.stack([image, image])[None], vision))
        np.testing.assert_array_equal(ours.reshape(expected.shape), expected)


def test_resize_equals_the_processors():
    """Bicubic (a = -0.5), its support widened when shrinking (antialiasing); rows, then columns, each rounded to uint8.

    The processor's PIL implementation does the same. Its torchvision one does not round between the two passes: on
    photographs that is a level here and there, on noise more.
    """
    by_pil, by_torchvision = Qwen2VLImageProcessorPil(), Qwen2VLImageProcessor()
    rng = np.random.default_rng(10)
    for _ in range(100):
        height, width, side = (int(size) for size in rng.integers(4, 260, 3))
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        size = SizeDict(height=side, width=side)
        expected = PilBackend.resize(by_pil, noise.transpose(2, 0, 1), size, by_pil.resample)
        np.testing.assert_array_equal(resize_square(noise, side), expected.transpose(1, 2, 0))
        smooth = np.asarray(Image.fromarray(noise[:4, :4]).resize((width, height), Image.Resampling.BILINEAR))
        other = torch.tensor(smooth).permute(2, 0, 1)
        other = TorchvisionBackend.resize(by_torchvision, other, size, by_torchvision.resample).permute(1, 2, 0)
        assert np.abs(resize_square(smooth, side).astype(int) - other.numpy()).max() <= 2
