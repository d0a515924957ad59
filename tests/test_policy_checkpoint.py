"""Policy folders: weights in and out, and what is said when something is wrong with them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx
from torch_policy import load_ours, random_model, save_policy_folder
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from revseg_jax.config import ChainConfig
from revseg_jax.errors import InputError, RunFailure
from revseg_jax.policy import checkpoint
from revseg_jax.policy.checkpoint import load_policy, load_tokenizer, save_policy
from revseg_jax.policy.config import PUBLISHED, from_hf, read_config, to_hf
from revseg_jax.policy.embedded_tokenizer import build_tokenizer, write_preprocessor
from revseg_jax.policy.hf_weights import TABLE, in_one_line, load_weights, read_weight, save_weights, weights_of
from revseg_jax.policy.safetensors_files import INDEX, SINGLE, open_checkpoint


@pytest.fixture(scope="module")
def torch_model():
    return random_model(20, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def source(torch_model, tmp_path_factory):
    """A whole policy folder whose weights and config transformers wrote."""
    folder = tmp_path_factory.mktemp("policies") / "source"
    torch_model.save_pretrained(folder)
    build_tokenizer(["Weights do not ask what is said."], folder)
    write_preprocessor(read_config(folder).vision, folder)
    return folder


@pytest.fixture
def broken(source, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(source, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.fixture(scope="module")
def tokenizer(source):
    return load_tokenizer(source)


def leaves(policy) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(policy, nnx.Param))}


def edit_tensors(folder: Path, change) -> None:
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / SINGLE, {"format": "pt"})


def test_every_parameter_is_in_the_table(source):
    policy = load_ours(source)
    assert {weight.path for weight in weights_of(policy)} == leaves(policy).keys()
    assert len(weights_of(policy)) == len(TABLE)


def test_transformers_loads_what_we_save(source, torch_model, tmp_path):
    loaded = load_policy(source)
    save_policy(loaded.policy, tmp_path / "out", source)
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.config.to_diff_dict() == type(model).from_pretrained(source).config.to_diff_dict()
    expected = torch_model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, torch_model(input_ids=ids).logits)


def test_transformers_loads_a_config_of_ours(source, tmp_path):
    policy = load_ours(source)
    save_policy(policy, tmp_path / "out")
    assert read_config(tmp_path / "out") == policy.config
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact_in_the_stored_type(source, tmp_path, dtype):
    first, second = tmp_path / "first", tmp_path / "second"
    save_policy(load_ours(source), first, source, dtype=dtype)
    save_policy(load_ours(first), second, first, dtype=dtype)
    assert (first / SINGLE).read_bytes() == (second / SINGLE).read_bytes()
    # The independent reader sees the type and values that torch's own rounding gives.
    stored, original = safetensors.torch.load_file(first / SINGLE), safetensors.torch.load_file(source / SINGLE)
    assert stored.keys() == original.keys()
    for name in stored:
        assert torch.equal(stored[name], original[name].to(getattr(torch, dtype))), name
    config = json.loads((first / "config.json").read_text())
    assert config["dtype"] == dtype
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(first).dtype == getattr(torch, dtype)


def test_param_dtype_and_stored_type(source, tmp_path):
    loaded = load_policy(source, dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in leaves(loaded.policy).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert loaded.policy.dtype == ml_dtypes.bfloat16
    save_policy(loaded.policy, tmp_path / "out", source)  # the parameters' own type
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out")[0].values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_shards_and_both_layouts_of_names(source, broken):
    policy = load_ours(source)
    expected = leaves(policy)
    (broken / SINGLE).unlink()
    save_weights(policy, broken, "float32", shard_bytes=50_000)
    files = sorted(path.name for path in broken.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((broken / name).stat().st_size < 60_000 for name in files)
    index = json.loads((broken / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in expected.values())
    sharded = leaves(load_ours(broken))
    assert all((sharded[path] == expected[path]).all() for path in expected)
    assert not any(Qwen2_5_VLForConditionalGeneration.from_pretrained(broken, output_loading_info=True)[1].values())

    def as_modules_are_named(tensors):
        for name in list(tensors):
            new = name.replace("model.", "model.language_model.").replace("visual.", "model.visual.")
            tensors[new] = tensors.pop(name)

    shutil.copy(source / SINGLE, broken)
    edit_tensors(broken, as_modules_are_named)
    renamed = leaves(load_ours(broken))
    assert all((renamed[path] == expected[path]).all() for path in expected)


def test_parts_of_a_parameter_can_be_read_alone(source):
    policy = load_ours(source)
    tensors, _ = open_checkpoint(source)
    whole = leaves(policy)
    for weight in weights_of(policy):
        index = tuple(slice(size // 2, None) for size in weight.shape)
        part = read_weight(weight, tensors, np.dtype(np.float32), index)
        np.testing.assert_array_equal(part, whole[weight.path][index])


def test_all_wrong_tensors_are_named_at_once(broken):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["visual.blocks.1.attn.qkv.bias"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
        tensors["model.layers.0.surprise"] = np.zeros(4, np.float32)
        tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.1.input_layernorm.weight"].astype(int)

    edit_tensors(broken, change)
    with pytest.raises(InputError) as caught:
        load_policy(broken)
    message = str(caught.value)
    assert str(broken) in message and "\n" not in message
    for problem in (
        "model.norm.weight is missing",
        "visual.blocks.1.attn.qkv.bias is missing",
        "model.layers.0.mlp.up_proj.weight has shape [3, 5], not [",
        "model.layers.0.surprise is unexpected",
        "model.layers.1.input_layernorm.weight has type I64",
    ):
        assert message.count(problem) == 1, message


def test_what_is_wrong_in_all_layers_is_said_once(broken):
    def rename(tensors):
        for name in list(tensors):
            if "up_proj" in name:
                tensors[name.replace("up_proj", "up_proj.base_layer")] = tensors.pop(name)

    edit_tensors(broken, rename)
    with pytest.raises(InputError) as caught:
        load_policy(broken)
    assert str(caught.value).count("up_proj") == 2 * 3  # the decoder's, and kernels and biases of the vision tower
    assert "model.layers.{0-1}.mlp.up_proj.weight is missing" in str(caught.value)
    assert "visual.blocks.{0-2}.mlp.up_proj.base_layer.bias is unexpected" in str(caught.value)
    assert in_one_line(["a.0.b is gone", "c", "a.2.b is gone", "a.7.b"]) == "a.{0,2}.b is gone; c; a.7.b"
    assert in_one_line(["c", "c", "a.5.b", "a.5.b"]) == "c; a.5.b"


def test_an_adapter_is_no_policy(broken):
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds a LoRA adapter: merge it first"):
        load_policy(broken)


def test_broken_files_are_named(source, broken):
    size = (broken / SINGLE).stat().st_size
    for length, words in ((size - 1, "is truncated: "), (40, "is truncated or not"), (0, "is truncated or not")):
        (broken / SINGLE).write_bytes((source / SINGLE).read_bytes()[:length])
        with pytest.raises(InputError, match=f"{SINGLE} {words}"):
            load_policy(broken)
    (broken / SINGLE).write_bytes(b"\x10" + bytes(7) + b"not json at all " + bytes(99))
    with pytest.raises(InputError, match=f"{SINGLE} is not a safetensors file"):
        load_policy(broken)
    (broken / SINGLE).unlink()
    with pytest.raises(InputError, match=f"neither {SINGLE} nor {INDEX}"):
        load_policy(broken)
    save_weights(load_ours(source), broken, "float32", shard_bytes=50_000)
    first, second = sorted(broken.glob("*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(InputError) as caught:
        load_policy(broken)
    assert f"{first.name} is missing" in str(caught.value) and f"{second.name} is truncated" in str(caught.value)
    assert "weight is missing" not in str(caught.value)  # the file is what is missing
    (broken / INDEX).write_text("[1, 2]")
    with pytest.raises(InputError, match="is not an index"):
        load_policy(broken)


def test_tied_embeddings(tmp_path):
    random_model(21, tie_word_embeddings=True).save_pretrained(tmp_path)
    policy = load_ours(tmp_path)
    assert not hasattr(policy.text, "lm_head") and len(weights_of(policy)) == len(TABLE) - 1
    # Some published files carry the tied tensor a second time.
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    load_ours(tmp_path)


def test_the_shared_matrix_may_stand_under_either_name(tmp_path):
    """safetensors' own writer keeps one of the names of a shared tensor, the first in the alphabet."""
    model = random_model(21, tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / SINGLE))
    assert "lm_head.weight" in safetensors.numpy.load_file(tmp_path / SINGLE)
    policy = load_ours(tmp_path)
    np.testing.assert_array_equal(policy.text.embedding[...], model.lm_head.weight.detach().numpy())


def test_a_null_number_of_key_heads_is_that_of_the_heads(source):
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"] |= {"num_key_value_heads": None}
    theirs = Qwen2_5_VLConfig(**raw).text_config.num_key_value_heads
    assert from_hf(raw).text.num_kv_heads == theirs == raw["text_config"]["num_attention_heads"]


def test_numbers_too_large_for_the_stored_type_are_not_saved(source, tmp_path):
    policy = load_policy(source)
    scale = policy.policy.text.norm.scale
    scale[...] = scale[...].at[0].set(1e6)
    with pytest.raises(RunFailure, match="model.norm.weight holds numbers too large for float16"):
        save_policy(policy.policy, tmp_path / "half", source, dtype="float16")
    assert not (tmp_path / "half").exists()


def test_an_output_matrix_of_its_own_is_used_whatever_the_config_says(tmp_path):
    """As by transformers; the saved policy says so itself."""
    folder = save_policy_folder(random_model(21, tie_word_embeddings=True), tmp_path / "tied")

    def turn(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()

    edit_tensors(folder, turn)
    tokens = np.arange(1, 9)[None]
    with torch.no_grad():
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        expected = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    policy = load_policy(folder)
    np.testing.assert_allclose(policy.logits(input_ids=tokens), expected, atol=2e-4)
    original = json.loads((folder / "config.json").read_text()) | {"keep": "me"}
    (folder / "config.json").write_text(json.dumps(original))
    policy.save(tmp_path / "untied")
    assert json.loads((tmp_path / "untied/config.json").read_text())["keep"] == "me"
    again = load_policy(tmp_path / "untied")
    np.testing.assert_array_equal(again.logits(input_ids=tokens), policy.logits(input_ids=tokens))
    assert not read_config(tmp_path / "untied").text.tie_word_embeddings


# Folders


def test_folder_round_trip(source, tmp_path):
    chain = ChainConfig(
        frames=8, frame_size=112, system_prompt='Say: {nothing} "more"\n\'', turn2_prompt="{description}"
    )
    loaded = load_policy(source)
    assert loaded.chain is None and loaded.folder == source
    save_policy(loaded.policy, tmp_path / "new" / "out", source, chain)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    again = load_policy(tmp_path / "new" / "out")
    assert again.chain == chain
    assert again.policy.config == loaded.policy.config
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template
    assert {path.name for path in source.iterdir()} | {"chain.yaml"} == {path.name for path in again.folder.iterdir()}
    # Everything of the source's config.json is kept.
    assert json.loads((again.folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_another_policys_config_is_not_copied(source, tmp_path):
    random_model(22).save_pretrained(tmp_path / "other")
    policy = load_ours(tmp_path / "other")
    save_policy(policy, tmp_path / "out", source)
    assert read_config(tmp_path / "out") == policy.config


def test_an_existing_folder_is_not_overwritten(source, tmp_path):
    policy = load_ours(source)
    (tmp_path / "out").mkdir()
    save_policy(policy, tmp_path / "out", source)  # an empty one is fine
    with pytest.raises(InputError, match="out exists already"):
        save_policy(policy, tmp_path / "out", source)


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(policy, folder, dtype):
        (folder / SINGLE).write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_weights", full)
    with pytest.raises(RunFailure, match="cannot write .*out: No space left on device"):
        save_policy(load_ours(source), tmp_path / "out", source)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match="cannot write"):
        save_policy(load_ours(source), tmp_path / "file" / "out", source)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_named(broken, name):
    (broken / name).unlink()
    with pytest.raises(InputError, match=f"lacks {name}"):
        load_policy(broken)


def test_wrong_folders_are_one_clear_line(broken, tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_policy(tmp_path / "nowhere")
    config = json.loads((broken / "config.json").read_text())
    for change, words in (
        ({"model_type": "qwen2_vl"}, "'qwen2_vl', not 'qwen2_5_vl'"),
        ({"text_config": {**config["text_config"], "hidden_act": "relu"}}, "not supported: hidden_act='relu'"),
        ({"vision_config": None, "text_config": None}, "missing vision_config.hidden_size, rope_scaling.mrope_section"),
        ({"vision_config": {**config["vision_config"], "depth": "3"}}, "not whole numbers above 0: .*depth='3'"),
        ({"text_config": {**config["text_config"], "num_hidden_layers": 0}}, "not whole .*num_hidden_layers=0"),
        ({"text_config": {**config["text_config"], "head_dim": 16.0}}, "not whole numbers above 0: head_dim=16.0"),
        ({"text_config": {**config["text_config"], "head_dim": 0}}, "not whole numbers above 0: head_dim=0"),
        ({"image_token_id": 1.5}, "not whole numbers above 0: image_token_id=1.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "not supported: quantization_config.quant_method='awq'"),
        ({"vision_config": [1], "text_config": "7B"}, "not objects: text_config='7B', vision_config=.1."),
        ({"quantization_config": ["awq"]}, "not objects: quantization_config="),
        ({"vision_config": {**config["vision_config"], "fullatt_block_indexes": 2}}, "fullatt_block_indexes=2"),
        ({"vision_config": {**config["vision_config"], "patch_size": [14, 14]}}, "not whole .*patch_size=.14, 14."),
        ({"vision_config": {**config["vision_config"], "tokens_per_second": 0}}, "not numbers .*tokens_per_second=0"),
        ({"text_config": {**config["text_config"], "rms_norm_eps": "1e-6"}}, "not numbers .*rms_norm_eps='1e-6'"),
        ({"text_config": {**config["text_config"], "rope_parameters": {"mrope_section": ["1"]}}}, "not three whole"),
        ({"text_config": {**config["text_config"], "head_dim": 2}}, "mrope_section .* does not add up to half of .* 2"),
    ):
        (broken / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=words):
            load_policy(broken)
    (broken / "config.json").write_text("[]")
    with pytest.raises(InputError, match="model_type is .*, not 'qwen2_5_vl'"):
        load_policy(broken)
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "chain.yaml").write_text("frames: many\n")
    with pytest.raises(InputError, match="chain.yaml: .*many"):
        load_policy(broken)
    (broken / "chain.yaml").unlink()
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer in .* cannot be read") as caught:
        load_policy(broken)
    assert "\n" not in str(caught.value)


def test_loading_does_not_import_torch(source):
    code = "import sys; from revseg_jax.policy.checkpoint import load_policy; load_policy(sys.argv[1])\n"
    code += "assert 'jax' in sys.modules and not {'torch', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(source)], check=True)


def test_problems_leave_the_policy_as_it_was(source, broken):
    policy = load_ours(source)
    before = leaves(policy)
    edit_tensors(broken, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(InputError):
        load_weights(broken, policy)
    after = leaves(policy)
    assert all((before[path] == after[path]).all() for path in before)


# As the 7B is published, but for what no policy reads.
FLAT = {
    "model_type": "qwen2_5_vl",
    "bos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_id": 151655,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vocab_size": 152064,
}


@pytest.mark.parametrize("size", ["3B", "7B", "32B", "72B"])
def test_configs_that_leave_out_defaults(size):
    """As transformers reads them: its own classes say what the defaults are."""
    expected = PUBLISHED[f"Qwen2.5-VL-{size}-Instruct"]
    whole = to_hf(expected)
    assert from_hf(FLAT) == PUBLISHED["Qwen2.5-VL-7B-Instruct"]
    defaults = Qwen2_5_VLConfig().to_dict()
    for kind in ("text_config", "vision_config"):
        kept = {k: v for k, v in whole[kind].items() if k not in defaults[kind] or defaults[kind][k] != v}
        whole[kind] = kept | {"model_type": whole[kind]["model_type"]}
    short = {key: value for key, value in whole.items() if key not in defaults or defaults[key] != value}
    assert "depth" not in short["vision_config"] and "image_token_id" not in short
    assert ("num_key_value_heads" in short["text_config"]) == (size in ("3B", "7B"))
    assert from_hf(short | {"model_type": "qwen2_5_vl"}) == expected


@pytest.mark.parametrize("root", [True, False, None])
@pytest.mark.parametrize("nested", [True, False, None])
def test_embeddings_are_tied_as_transformers_ties_them(root, nested):
    raw = to_hf(PUBLISHED["Qwen2.5-VL-3B-Instruct"])
    for part, value in ((raw, root), (raw["text_config"], nested)):
        del part["tie_word_embeddings"]
        if value is not None:
            part["tie_word_embeddings"] = value
    assert from_hf(raw).text.tie_word_embeddings == Qwen2_5_VLConfig(**raw).tie_word_embeddings


def test_wrong_arguments_are_named(source):
    for arguments in ({"dtype": "bf16"}, {"dtype": None}, {"param_dtype": "int8"}, {"remat": "all"}):
        with pytest.raises(InputError, match=f"{next(iter(arguments))}=.* is not one of "):
            load_policy(source, **arguments)


def test_tokens_outside_the_vocabulary_are_refused(source):
    policy = load_policy(source)
    size = policy.policy.config.text.vocab_size
    for strange in (size, -100):
        with pytest.raises(InputError, match=f"not in the vocabulary 0..{size - 1}"):
            policy.logits(input_ids=np.array([[1, strange]]))
        # In padding nobody reads them.
        policy.logits(input_ids=np.array([[1, strange]]), attention_mask=np.array([[1, 0]]))


def test_a_policy_whose_files_are_gone_is_not_saved(broken, tmp_path):
    policy = load_policy(broken)
    (broken / "config.json").unlink()
    policy.save(tmp_path / "config")  # is known
    assert load_policy(tmp_path / "config").policy.config == policy.policy.config
    (broken / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="lacks tokenizer.json, which the saved policy needs"):
        policy.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_config_keys_survive_a_round_trip(source):
    config = read_config(source)
    assert from_hf(to_hf(config)) == config
    tied = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_word_embeddings=True))
    assert from_hf(to_hf(tied)) == tied
