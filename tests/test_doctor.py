"""`revseg doctor`: each thing that may be missing is named with its remedy, and decides the exit code."""

from __future__ import annotations

import pytest

from revseg_jax import doctor
from revseg_jax.cli import main
from revseg_jax.config import load_config
from revseg_jax.data.synthetic_builder import prepare_synthetic
from revseg_jax.tracker.process import run_sidecar


def missing(findings) -> dict[str, str]:
    return {finding.name: finding.remedy for finding in findings if finding.remedy and finding.needed}


def test_a_machine_with_all_it_needs_exits_0(capsys, tmp_path):
    prepare_synthetic(tmp_path / "clips", "easy", 1, 1, seed=0)
    with run_sidecar(threads=1) as endpoint:
        main(["doctor", f"data.train=[{tmp_path}/clips]", f"tracker.endpoints=[{endpoint}]"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "optional ")) for line in lines)
    for words in (
        "python: 3.",
        "jax 0.",
        "devices: ",
        "policy: embedded",
        f"sidecar: {endpoint} serves",
        "expressions",
    ):
        assert any(words in line for line in lines), words


def test_what_is_missing_is_named_and_exits_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "policy.path=/nowhere", "data.train=[/no clips]", "tracker.endpoints=[127.0.0.1:9]"])
    captured = capsys.readouterr()
    assert stop.value.code == 1 and captured.err == "revseg: error: 3 of these things are missing\n"
    named = [line.split()[1] for line in captured.out.splitlines() if line.startswith("MISSING")]
    assert named == ["policy:", "data:", "sidecar:"] and "set policy.path" in captured.out


def test_chips_that_jax_cannot_use(monkeypatch):
    """On a CPU machine that is told it had them; the plugins are hidden where they are installed."""
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert missing(doctor.devices(has_gpu=False, has_tpu=False)) == {}
    found = missing(doctor.devices(has_gpu=True, has_tpu=True))
    assert "revseg-jax[tpu]" in found["jax for TPU"] and "jax[cuda13]" in found["jax for NVIDIA GPU"]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "nvidia-cudnn-cu12" else "9")
    assert missing(doctor.devices(has_gpu=True, has_tpu=False)).keys() == {"devices"}
    monkeypatch.setattr(doctor, "version", lambda name: "9")
    assert missing(doctor.devices(has_gpu=True, has_tpu=False)).keys() == {"cudnn", "devices"}


def test_packages_that_are_absent(monkeypatch):
    known = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: None if name in ("sam2", "flax", "gcsfs") else known(name))
    found = missing(doctor.packages())
    assert found == {
        "packages": "install flax: pip install revseg-jax",
        "sam2": "SAM2_BUILD_CUDA=0 pip install sam2==1.1.0",
    }
    monkeypatch.setattr(doctor, "version", lambda name: None)
    (prometheus,) = [finding for finding in doctor.packages() if finding.name == "prometheus_client"]
    assert not prometheus.needed and str(prometheus).startswith("optional prometheus_client: not installed")
    config = load_config(None, ["run.dir=gs://b/run"])
    assert missing(doctor.stores(config)) == {"gcsfs": "pip install gcsfs"}
    assert missing(doctor.stores(load_config(None, ["run.dir=run"]))) == {}
