"""The command as a user types it: exit codes and one-line errors."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from omegaconf import OmegaConf

from revseg_jax import compile
from revseg_jax import config as configuration
from revseg_jax.cli import load, main, parser, spare_absent_chips
from revseg_jax.config import ChainConfig, check_training, load_config
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_policy, policy_digest, resolve_folder
from revseg_jax.rollout.loading import spoken_chain

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = str(CONFIGS / "demo.yaml")


def failing(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config", DEMO, "run.stepz=3"], "stepz"),
        (["train", "--config", DEMO, "learner.algo=ppo"], "did you mean learner.algorithm?"),
        (["train", "--config", DEMO, "rollout.temperature=0"], "the rollouts of a group would be the same"),
        (["train", "--config", DEMO, "data.train=clips"], "data.train: it is a list: write data.train=[A] or"),
        (["train", "--config", DEMO, "data.train=[A,"], "a list with spaces needs quotes: 'data.train=[A, B]'"),
        (["train", "--config", DEMO, "run.dir="], "run.dir: it is empty"),
        (["train", "--config", "dapo.yaml"], "does not exist; did you mean configs/dapo.yaml?"),
        (["train", "--config", DEMO, f"run.dir={DEMO}"], "is a file: choose a folder"),
        (["prepare", "synthetic", "--out", "x", "--strict"], "are for downloads: synthetic clips are drawn"),
        (["prepare", "kinetics", "--out", "x"], "dataset kinetics is not one of"),
        (["prepare", "mevis", "--out", "x"], "--source is missing"),
        (["train", "--config", DEMO, "rollout.top_k=1"], "the rollouts of a group would be the same"),
        (["train", "--config", DEMO, "policy.param_dtype=bfloat16"], "training keeps parameters in float32"),
        (["evaluate", "--out", "x", "--fly"], "see revseg evaluate --help"),
        (["verify", "RUN", "--steps", "0"], "--steps: 0 is not a number from 1 on"),
        (["train", "--config", DEMO, "run.steps=many"], "run.steps"),
        (["train", "--config", DEMO, "rewards.preset=best"], "rewards.preset=best"),
        (["train", "--config", DEMO, "rollout.prompts_per_step=5", "rollout.prompts_per_batch=2"], "must divide"),
        (["train", "--config", DEMO, "nonsense"], "key=value"),
        (["train", "--config", DEMO, "data.train=[a"], "'data.train=[a': its value is not valid YAML"),
        (["train"], "add run.dir=FOLDER"),
        (["score", "DIR", "--benchmark", "mevis", "--data", "DATA", "--workers", "-1"], "--workers: -1"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--config", DEMO, "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--config", DEMO, "policy.path=/nowhere", "data.train=[/nowhere]", "rewards.mask=0"], "/nowhere"),
        (["evaluate", "--config", DEMO, "--out", "/tmp/x", "data.test=[/nowhere]"], "/nowhere"),
        (["export", "/nowhere", "--out", "/tmp/x"], "/nowhere"),
        (["report", "/nowhere"], "/nowhere"),
        (["fly"], "fly"),
        (["segment", "video.mp4"], "--out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, words):
    code, err = failing(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("revseg")]
    assert code == 2
    assert len(lines) == 1 and words in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(("text", "words"), [("run:\n\tsteps: 5\n", "line 2"), ("run: [a)\n", "line 2: expected")])
def test_a_file_that_is_not_yaml_is_named_with_its_line(capsys, tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    code, err = failing(capsys, "train", "--config", str(path))
    assert code == 2 and err.startswith(f"revseg: error: config file {path} is not valid YAML: {words}")
    assert len(err.splitlines()) == 1


def test_a_bad_override_does_not_blame_the_file(capsys):
    _, err = failing(capsys, "train", "--config", DEMO, "learner.learning_rat=1")
    assert "learning_rat" in err and DEMO not in err


def test_sidecars_that_nobody_will_ask_are_said(capsys, tmp_path):
    words = ["train", "--config", DEMO, f"run.dir={tmp_path / 'run'}", "data.train=[/nowhere]"]
    words.append("tracker.endpoints=[host:1]")
    assert "tracker.endpoints will not be asked" in failing(capsys, *words, "rewards.mask=0")[1]
    assert "tracker.endpoints" not in failing(capsys, *words)[1]


@pytest.mark.parametrize(
    "installed, tpu, driver, platforms",
    [
        ({"libtpu"}, False, False, "cpu"),
        ({"jax_cuda13_plugin"}, False, False, "cpu"),
        ({"libtpu", "jax_cuda12_plugin"}, False, False, "cpu"),
        ({"libtpu"}, False, True, "cpu"),  # a GPU that JAX has no package for
        ({"libtpu"}, True, False, None),
        ({"libtpu", "jax_cuda13_plugin"}, False, True, None),
        (set(), False, False, None),
    ],
)
def test_chips_that_are_not_there_are_not_looked_for(monkeypatch, installed, tpu, driver, platforms):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr("revseg_jax.cli.find_spec", lambda name: name in installed or None)
    monkeypatch.setattr("revseg_jax.parallel.startup.tpu_attached", lambda: tpu)
    monkeypatch.setattr("revseg_jax.parallel.startup.gpu_driver", lambda: driver)
    spare_absent_chips()
    assert os.environ.get("JAX_PLATFORMS") == platforms
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    spare_absent_chips()
    assert os.environ["JAX_PLATFORMS"] == "tpu"


def test_training_takes_the_chain_that_the_policy_was_trained_with(tmp_path, capsys):
    """As evaluate does: the defaults are the published policies', whose prompts the embedded one cannot hold."""
    prepare_synthetic(tmp_path / "clips", "easy", 1, 1, seed=0, progress=False)
    main(["train", f"data.train=[{tmp_path / 'clips'}]", f"run.dir={tmp_path / 'run'}", "run.steps=0"])
    chain = load_config(tmp_path / "run/config.yaml").chain
    assert (chain.frames, chain.frame_size) == (8, 112)
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f"{tmp_path / 'run'}: step 0 of 0, digest of the parameters ")


def test_a_run_folder_is_no_policy(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="is a run's folder: write its policy with `revseg export "):
        load_policy(tmp_path)


def test_a_full_device_is_said_in_one_line(capsys, monkeypatch, tmp_path):
    def too_much(_):
        return jnp.zeros((10**9, 10**6)) + 1  # four petabytes

    monkeypatch.setattr("revseg_jax.train.load_engine", too_much)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    prepare_synthetic(tmp_path / "clips", "easy", 1, 1, seed=0, progress=False)
    data = f"data.train=[{tmp_path / 'clips'}]"
    words = ["train", "--config", DEMO, f"run.dir={tmp_path / 'run'}", data, "rewards.mask=0"]
    code, err = failing(capsys, *words)
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith("revseg: error: a device's memory is full (at revseg_jax/train.py:")
    assert "4000000000000000 bytes; lower rollout.prompts_per_batch" in err and "MEM_FRACTION" not in err
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "JAX takes 75% of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION" in failing(capsys, *words)[1]
    monkeypatch.setattr("revseg_jax.train.load_engine", lambda _: jnp.zeros(2) + jnp.zeros(3))
    with pytest.raises(TypeError):
        main(words)


def test_off_needs_no_quotes(tmp_path):
    path = tmp_path / "off.yaml"
    path.write_text("learner:\n  kl: off\n")
    for paths, overrides in (([DEMO], ["learner.kl=off"]), ([DEMO, path], [])):
        assert load_config(paths, ["run.dir=somewhere", *overrides]).learner.kl == "off"


def test_evaluation_speaks_as_the_policy_was_taught_but_for_what_is_named(tmp_path):
    sidecars, frames = tmp_path / "sidecars.yaml", tmp_path / "frames.yaml"
    sidecars.write_text("tracker:\n  endpoints: ['host:1']\n")
    frames.write_text("chain:\n  frames: 6\n")
    taught = load_policy("embedded").chain

    def chain(paths, overrides):
        overrides = ["run.dir=somewhere", *overrides]
        return spoken_chain(load_config(paths, overrides), paths, overrides).chain

    assert chain([sidecars], []) == taught
    for given in (["chain.fps=3"], ["chain[fps]=3"], ["chain={fps: 3}"]):
        assert chain([sidecars, frames], given) == dataclasses.replace(taught, frames=6, fps=3.0)


def test_the_policys_own_chain_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(compile, "main", lambda config, *_: compiled.append(config.chain))
    main(["compile", "--topology", "v5e:2x2", "chain.frames=6"])
    assert compiled == [dataclasses.replace(load_policy("embedded").chain, frames=6)] != [ChainConfig(frames=6)]


def test_a_policys_digest_is_of_its_content(tmp_path):
    policy = resolve_folder("embedded")
    for name in ("here", "moved", "other"):
        shutil.copytree(policy, tmp_path / name)
    with open(tmp_path / "other/model.safetensors", "r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read()[0]
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))
    here, moved, other = (policy_digest(tmp_path / name) for name in ("here", "moved", "other"))
    assert here == moved == policy_digest(f"{tmp_path / 'here'}/") == policy_digest("embedded") != other


def test_help_answers_without_loading_anything_heavy():
    code = (
        "import sys; from revseg_jax.cli import parser; parser(); print('jax' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_sidecar_that_is_not_there_fails_the_check():
    with pytest.raises(SystemExit) as stop:
        main(["sidecar", "--check", "--port", "1"])
    assert stop.value.code == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_file_loads(path):
    load_config(path, ["run.dir=somewhere"])


def test_config_survives_its_own_yaml(tmp_path):
    config = load_config(DEMO, ["run.seed=5", "data.train=[a,b]"])
    (tmp_path / "config.yaml").write_text(configuration.to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_demo_speaks_as_the_embedded_policy_was_taught():
    assert load_policy("embedded").chain == load_config(DEMO).chain


@pytest.mark.parametrize(
    "overrides",
    [
        ["chain.frames=7"],
        ["chain.fps=0"],
        ["chain.frame_size=0"],
        ["data.test_clips=-1"],
        ["run.seed=-1"],
        ["run.seed=99999999999999999999"],
        ["rollout.temperature=-1"],
        ["rollout.top_p=0"],
        ["rollout.prompts_per_batch=-4"],
        ["learner.prompts_per_microbatch=-4"],
        ["learner.learning_rate=nan"],
        ["learner.logprob_chunk=0"],
        ["rollout.group_size=0"],
        ["rollout.group_size=1"],
        ["rewards.format=0.25", "rewards.preset=paper_text"],
        ["rewards.temporal=-1"],
        ["rewards.preset=custom", "rewards.format=0", "rewards.temporal=0", "rewards.spatial=null", "rewards.mask=0"],
        ["learner.algorithm=magic"],
        ["learner.advantage=best"],
        ["learner.credit=token"],
        ["learner.aggregation=sum"],
        ["learner.ratio=group"],
        ["learner.kl=both"],
        ["learner.kl_estimator=k4"],
        ["learner.dual_clip=0.9"],
        ["learner.importance_cap=-1"],
        ["learner.minibatches=3"],
        ["learner.prompts_per_microbatch=4", "learner.minibatches=4"],
        ["learner.ppo.critic=large"],
        ["learner.ppo.gae_lambda=1.1"],
        ["learner.credit=turn", "learner.algorithm=ppo"],
        ["rollout.resample_limit=2", "learner.algorithm=ppo", "rollout.group_size=1"],
    ],
    ids="-".join,
)
def test_impossible_settings_are_refused(overrides):
    with pytest.raises(InputError, match=overrides[0].split("=")[0]) as stop:
        load_config(DEMO, ["run.dir=somewhere", *overrides])
    assert len(str(stop.value).splitlines()) == 1


def test_the_only_answer_alone_bounds_the_overlong_penalty():
    options = ["run.dir=somewhere", "chain.turns=1", "rewards.overlong_tokens=40"]
    check_training(load_config(DEMO, options))  # of 46; a second answer would have 30
    with pytest.raises(InputError, match="rewards.overlong_tokens=47 .* limit 46"):
        check_training(load_config(DEMO, [*options, "rewards.overlong_tokens=47"]))


PRESETS = ("paper_text", "paper_curves", "dapo", "dr_grpo", "gspo", "ppo")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_change_what_they_name_and_nothing_else(preset):
    """Laid over a config, only fields of the preset's own file differ from it."""
    base, path = CONFIGS / "revseg_7b.yaml", CONFIGS / f"{preset}.yaml"
    named = OmegaConf.load(path)
    assert set(named) <= {"rollout", "rewards", "learner"}
    layered = OmegaConf.create(configuration.to_yaml(load_config([base, path], ["run.dir=somewhere"])))
    assert OmegaConf.merge(layered, named) == layered
    alone = OmegaConf.create(configuration.to_yaml(load_config(base, ["run.dir=somewhere"])))
    assert OmegaConf.merge(alone, named) == layered


def test_overrides_may_stand_anywhere(capsys):
    words = ["reproduce", "chain", "run.steps=7", "--seeds", "1", "run.seed=2", "--clips", "3", "4", "data.workers=1"]
    options = parser().parse_args(words)
    assert (options.table, options.clips) == ("chain", [3, 4])
    assert options.overrides == ["run.steps=7", "run.seed=2", "data.workers=1"]
    for stray in ("word", "--option=1"):
        code, err = failing(capsys, *words, stray)
        assert code == 2 and stray in err
    assert failing(capsys, "report", "run", "run.steps=7")[0] == 2


def test_every_command_lays_its_configs_over_each_other():
    options = parser().parse_args(["demo", "--config", DEMO, "--config", str(CONFIGS / "demo_ppo.yaml"), "run.steps=7"])
    config = load(options)
    assert config.learner.algorithm == "ppo" and config.chain == load_config(DEMO).chain and config.run.steps == 7
    assert load(parser().parse_args(["demo"])) == load_config(DEMO)


def test_yaml_with_unknown_section_names_it(tmp_path):
    path = tmp_path / "bad.yaml"
    OmegaConf.save(OmegaConf.create({"rollouts": {"group_size": 2}}), path)
    with pytest.raises(InputError, match="rollouts"):
        load_config(path)


def test_published_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    """As somebody's who installed the package and has no checkout; a file of the user's own comes first."""
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo.yaml") == load_config(DEMO)
    assert parser().parse_args(["demo"]).default_config == "configs/demo.yaml"
    with pytest.raises(InputError, match="config file configs/nowhere.yaml does not exist"):
        load_config("configs/nowhere.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text("run: {dir: mine}")
    assert load_config("configs/demo.yaml").run.dir == "mine"


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("revseg-jax 0.")


def test_no_sidecar_there(capsys):
    assert failing(capsys, "sidecar", "--check", "--port", "1") == (
        1,
        "revseg: error: no sidecar serves at 127.0.0.1:1\n",
    )
