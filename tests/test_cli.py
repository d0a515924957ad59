"""The command as a user types it: exit codes and one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from revseg_jax import config as configuration
from revseg_jax.cli import main
from revseg_jax.config import load_config
from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_policy

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
        (["train", "--config", DEMO, "run.steps=many"], "run.steps"),
        (["train", "--config", DEMO, "rewards.preset=best"], "rewards.preset=best"),
        (["train", "--config", DEMO, "rollout.prompts_per_step=5", "rollout.prompts_per_batch=2"], "must divide"),
        (["train", "--config", DEMO, "nonsense"], "key=value"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--config", DEMO, "policy.path=/nowhere", "data.train=[/nowhere]", "rewards.mask=0"], "/nowhere"),
        (["evaluate", "--config", DEMO, "data.test=[/nowhere]"], "/nowhere"),
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


@pytest.mark.parametrize("overrides", [["chain.frames=7"], ["rollout.group_size=0"], ["learner.algorithm=magic"]])
def test_impossible_settings_are_refused(overrides):
    with pytest.raises(InputError, match=overrides[0].split("=")[0]):
        load_config(DEMO, overrides)


def test_yaml_with_unknown_section_names_it(tmp_path):
    path = tmp_path / "bad.yaml"
    OmegaConf.save(OmegaConf.create({"rollouts": {"group_size": 2}}), path)
    with pytest.raises(InputError, match="rollouts"):
        load_config(path)
