"""tpu_scripts/: what the scripts would call, in which order, and what they do when a call fails or machines vanish."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from standin import StandIns

from revseg_jax.config import load_config

ROOT = Path(__file__).parents[1] / "tpu_scripts"
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.sh") if path.name != "common.sh")
NEEDED = {"secrets.sh": ["host"], "install.sh": ["/opt/revseg", "tpu"], "preemptible.sh": ["true"]}
TOOLS = ("gcloud", "kubectl", "docker", "xpk", "sbatch", "srun", "scancel", "scontrol", "sudo", "systemctl", "revseg")
RUNNING = "training: ActiveState=active SubState=running ExecMainStatus=0"
FINISHED = "training: ActiveState=active SubState=exited ExecMainStatus=0"
FAILED = "training: ExecMainStatus=1 ActiveState=failed SubState=failed"
REFUSED = "training: ExecMainStatus=2 ActiveState=failed SubState=failed"
STATE, STATES, HOSTS = "queued-resources list", "systemctl show", "scontrol show hostnames"
ARGUMENTS = ["--config", "configs/revseg_7b.yaml", "data.train=[gs://b/my clips,gs://b/'x']", "run.dir=gs://b/$RUN"]


class Scripts:
    def __init__(self, folder: Path):
        self.folder = folder
        self.standins = StandIns(folder / "bin", *TOOLS)
        self.secrets = folder / "secrets"
        self.changed: dict[str, str] = {}

    def start(self, name: str, *arguments: str, **more) -> subprocess.Popen:
        quoted = " ".join(map(shlex.quote, ARGUMENTS))
        own = {"POLL_SECONDS": "0", "SECRETS": shlex.quote(str(self.secrets)), "TRAIN_ARGUMENTS": f"({quoted})"}
        own |= {"SIDECARS": "1", "SLURM_SIDECAR_CHECKPOINT": "/shared/sam2.1_hiera_large.pt"}
        settings = self.folder / "my settings.env"
        lines = [f"{key}={value}\n" for key, value in (own | self.changed).items()]
        settings.write_text((ROOT / "settings.env").read_text() + "".join(lines))
        options = [] if name == "preemptible.sh" else ["--settings", str(settings)]
        environment = os.environ | {"PATH": self.standins.path(), "HOME": str(self.folder)} | more
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        command = [str(ROOT / name), *options, *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)

    def run(self, name: str, *arguments: str, **more) -> tuple[int, str, str]:
        process = self.start(name, *arguments, **more)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def verbs(self) -> list[str]:
        """Calls of gcloud in short, looks left out."""
        found = []
        for call in self.standins.calls():
            words = " ".join(call)
            for part, verb in (("queued-resources create", "create"), ("queued-resources delete", "delete"),
                               ("git clone", "setup"), ("systemd-run", "train"), ("instances start", "sidecar"),
                               ("journalctl", "log")):  # fmt: skip
                if part in words:
                    found.append(verb)
        return found


@pytest.fixture
def scripts(tmp_path):
    return Scripts(tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself_and_can_only_print(scripts, name):
    code, out, err = scripts.run(name, "--help")
    assert code == 0 and Path(name).name in out and len(out.splitlines()) >= 3, err
    scripts.changed = {"SIDECARS": "0"} if name == "gke/xpk.sh" else {}
    code, out, err = scripts.run(name, "--dry-run", *NEEDED.get(name, []))
    assert code == 0 and out.startswith("+ ") and not err, err
    assert scripts.standins.calls() == [] and not scripts.secrets.exists()


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "preemptible.sh"])
def test_mistakes_are_one_line_and_exit_code_2(scripts, name):
    mistakes = [(["--fast"], "unknown option --fast"), (["--settings"], "needs a file")]
    if name != "install.sh":  # it runs on machines that have no settings
        mistakes.append((["--settings", "/nowhere.env", *NEEDED.get(name, [])], "/nowhere.env does not exist"))
    for arguments, words in mistakes:
        code, _, err = scripts.run(name, *arguments)
        assert code == 2 and words in err and len(err.splitlines()) == 1
    assert scripts.standins.calls() == []


def test_scripts_are_shellcheck_clean():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: install the extra [dev]"
    found = subprocess.run([shellcheck, *(str(path) for path in ROOT.rglob("*.sh"))], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_missing_tool_or_an_empty_setting_is_named(scripts):
    scripts.changed = {"PROJECT": ""}
    code, _, err = scripts.run("create.sh")
    assert code == 2 and "PROJECT is empty in" in err
    (scripts.standins.folder / "xpk").unlink()
    scripts.changed = {"SIDECARS": "0"}
    code, _, err = scripts.run("gke/xpk.sh")
    assert code == 2 and "xpk is not on PATH" in err


# --- TPU VMs ---------------------------------------------------------------------------------------------------------


def test_create_asks_once_and_waits(scripts):
    scripts.standins.reply((STATE, ["", "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]))
    code, _, err = scripts.run("create.sh")
    assert code == 0, err
    (create,) = [call for call in scripts.standins.calls() if "create" in call]
    assert create[1:6] == ["compute", "tpus", "queued-resources", "create", "revseg-7b"]
    assert {"--spot", "--node-id=revseg-7b", "--accelerator-type=v5p-128", "--zone=us-east5-a"} <= set(create)

    scripts.changed = {"SPOT": "no", "SLICES": "2", "SERVICE_ACCOUNT": "me@p"}
    scripts.standins.reply((STATE, ["", "ACTIVE"]))
    scripts.run("create.sh")
    create = [call for call in scripts.standins.calls() if "create" in call][-1]
    assert {"--node-count=2", "--node-prefix=revseg-7b", "--service-account=me@p"} <= set(create)
    assert "--spot" not in create


def test_create_replaces_a_preempted_slice_and_reports_a_refused_one(scripts):
    scripts.standins.reply((STATE, ["SUSPENDED", "SUSPENDED", "", "ACTIVE"]))
    assert scripts.run("create.sh")[0] == 0
    assert scripts.verbs() == ["delete", "create"]
    scripts.standins.reply((STATE, ["", "FAILED"]), ("queued-resources describe", ["no quota for v5p"]))
    code, _, err = scripts.run("create.sh")
    assert code == 1 and "no quota for v5p" in err


@pytest.mark.parametrize("failing", [STATE, "queued-resources create"])
def test_create_stops_when_gcloud_fails(scripts, failing):
    scripts.standins.reply((failing, [1]))
    code, _, err = scripts.run("create.sh")
    assert code != 0 and "failed as asked" in err and len(scripts.verbs()) <= 1


def test_setup_installs_the_commit_and_the_secrets_on_all_hosts(scripts):
    code, _, err = scripts.run("setup.sh")
    assert code == 2 and "start the sidecars first" in err
    scripts.secrets.mkdir()
    (scripts.secrets / "token").write_text("secret")
    code, _, err = scripts.run("setup.sh")
    assert code == 0, err
    calls = [call for call in scripts.standins.calls() if "ssh" in call or "scp" in call]
    assert all({"--node=all", "--worker=all"} <= set(call) for call in calls)
    (copy,) = [call for call in calls if "scp" in call]
    assert str(scripts.secrets / "token") in copy and "revseg-7b:.revseg/" in copy
    assert "secret" not in str(calls).replace(str(scripts.secrets), "")
    scripts.standins.reply(("scp", [1]))
    assert scripts.run("setup.sh")[0] != 0


def remote_command(call: list[str]) -> str:
    return next(word for word in call if word.startswith("--command=")).removeprefix("--command=")


def test_train_starts_the_settings_words_exactly(scripts):
    """The command for the hosts is run by a real shell, as ssh does, up to systemd-run."""
    scripts.standins.reply((STATES, [FAILED]))
    assert scripts.run("train.sh")[0] == 0
    command = remote_command(scripts.standins.calls()[-1])
    (scripts.folder / "revseg_jax").mkdir()
    environment = os.environ | {"PATH": scripts.standins.path(), "HOME": str(scripts.folder)}
    subprocess.run(["bash", "-c", command], env=environment, check=True)
    called = scripts.standins.calls()[-1]
    assert called[:2] == ["sudo", "systemd-run"] and "--property=TimeoutStopSec=120" in called
    words = called[called.index("train") + 1 :]
    assert words[: len(ARGUMENTS)] == ARGUMENTS
    assert words[len(ARGUMENTS) :] == [
        "tracker.endpoints=[revseg-7b-sidecar-0.us-east5-a.c.my-project.internal:50051]",
        f"tracker.tls_ca={scripts.folder}/.revseg/ca.crt",
        f"tracker.token_file={scripts.folder}/.revseg/token",
    ]
    assert f"--working-directory={scripts.folder}/revseg_jax" in called


def test_train_leaves_a_running_trainer_alone_and_needs_no_sidecar(scripts):
    scripts.standins.reply((STATES, [f"{RUNNING}\n{RUNNING}"]))
    code, _, err = scripts.run("train.sh")
    assert code == 0 and "running already" in err and scripts.verbs() == []
    scripts.standins.reply((STATES, [f"{RUNNING}\n{FAILED}"]))  # one host fell: all start again
    scripts.changed = {"SIDECARS": "0"}
    assert scripts.run("train.sh")[0] == 0
    assert "systemctl stop" in remote_command(scripts.standins.calls()[-1])
    assert "tracker" not in remote_command(scripts.standins.calls()[-1])


def watched(scripts, *replies, **changed) -> tuple[int, str]:
    scripts.secrets.mkdir(exist_ok=True)
    (scripts.secrets / "token").write_text("secret")
    scripts.changed = changed
    scripts.standins.reply(*replies)
    code, _, err = scripts.run("watch.sh")
    return code, err


def test_watch_goes_on_after_a_preemption(scripts):
    states = [f"{RUNNING}\n{RUNNING}", FAILED, f"{FINISHED}\n{RUNNING}", f"{FINISHED}\n{FINISHED}"]
    # running | gone: watch, create twice | there again: create, watch...
    queue = ["ACTIVE", "SUSPENDED", "SUSPENDED", "SUSPENDED", "", "ACTIVE"]
    code, err = watched(scripts, (STATE, queue), (STATES, states))
    assert code == 0 and "the run is finished" in err, err
    assert scripts.verbs() == ["log", "delete", "create", "setup", "train", "log", "log"]


def test_watch_waits_for_a_slice_without_deleting_the_request(scripts):
    queue = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "ACTIVE"]
    assert watched(scripts, (STATE, queue), (STATES, [FAILED, FINISHED]))[0] == 0
    assert scripts.verbs() == ["setup", "train", "log"]


def test_watch_starts_a_failed_trainer_again_but_not_for_ever(scripts):
    code, err = watched(scripts, (STATE, ["ACTIVE"]), (STATES, [f"{RUNNING}\n{FAILED}"]), MAX_FAILURES="2")
    assert code == 1 and "failed 3 times" in err
    assert scripts.verbs() == ["log", "train", "log", "train", "log"]


def test_watch_blames_a_slice_that_cannot_be_reached_not_the_trainer(scripts):
    """One host is gone before the queue says so: the others failed, and starting them fails."""
    queue = ["ACTIVE"] * 3 + ["SUSPENDED", "SUSPENDED", "SUSPENDED", "", "ACTIVE"]
    states = [FAILED] * 7 + [FINISHED]  # three looks and two of train.sh in each, then that of the new slice
    replies = ((STATE, queue), (STATES, states), ("systemd-run", [255, 255, 255, ""]))
    code, err = watched(scripts, *replies, MAX_FAILURES="1")
    assert code == 0, err
    assert scripts.verbs()[-5:] == ["delete", "create", "setup", "train", "log"]


def test_watch_ends_where_starting_again_changes_nothing(scripts):
    code, err = watched(scripts, (STATE, ["ACTIVE"]), (STATES, [f"{FAILED}\n{REFUSED}"]))
    assert code == 2 and "refuses" in err and scripts.verbs() == ["log"]
    code, err = watched(scripts, (STATE, ["SUSPENDED"]), MAX_RESTARTS="0")
    assert code == 1 and "lost 1 times" in err


@pytest.mark.parametrize("status", [203, 217, 255])
def test_watch_takes_a_status_that_begins_with_2_for_a_failure(scripts, status):
    for words in (f"ExecMainStatus={status} ActiveState=failed", f"ActiveState=failed ExecMainStatus={status}"):
        states = (STATES, [f"training: {words}\n{RUNNING}"])
        code, err = watched(scripts, (STATE, ["ACTIVE"]), states, MAX_FAILURES="0")
        assert code == 1 and "failed 1 times" in err


def test_watch_gives_up_a_slice_that_does_not_answer(scripts):
    queue = ["ACTIVE"] * 11 + ["", "", "ACTIVE"]  # ten looks; delete.sh; watch; create.sh
    code, err = watched(scripts, (STATE, queue), (STATES, [255] * 10 + [FAILED, FINISHED]))
    assert code == 0, err
    assert scripts.verbs() == ["delete", "create", "setup", "train", "log"]


def test_watch_survives_failing_calls_and_starts_stopped_sidecars(scripts):
    code, _ = watched(
        scripts,
        ("instances list", ["revseg-7b-sidecar-0", ""]),
        ("instances start", [1]),
        (STATE, [1, "ACTIVE"]),
        ("journalctl", [1]),
        (STATES, [FINISHED]),
    )
    assert code == 0 and scripts.verbs() == ["sidecar", "log"]


def test_delete_deletes_what_is_there(scripts):
    scripts.standins.reply((STATE, ["ACTIVE", ""]))
    assert scripts.run("delete.sh")[0] == 0 and scripts.run("delete.sh")[0] == 0
    assert scripts.verbs() == ["delete"]


# --- sidecars --------------------------------------------------------------------------------------------------------


def test_secrets_make_a_certificate_that_clients_believe_for_its_hosts_alone(scripts):
    assert scripts.run("secrets.sh", "localhost", "sidecar-1.sidecar")[0] == 0
    first = {path.name: path.read_bytes() for path in scripts.secrets.iterdir()}
    assert {path.stat().st_mode & 0o777 for path in scripts.secrets.iterdir()} == {0o600}
    assert len(first["token"].strip()) == 64
    handshake(scripts.secrets, "sidecar-1.sidecar")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(scripts.secrets, "sidecar-2.sidecar")
    assert scripts.run("secrets.sh", "sidecar-2.sidecar")[0] == 0
    assert all((scripts.secrets / name).read_bytes() == first[name] for name in ("ca.crt", "ca.key", "token"))
    handshake(scripts.secrets, "sidecar-2.sidecar")


def handshake(secrets: Path, host: str) -> None:
    client, server = ssl.create_default_context(cafile=secrets / "ca.crt"), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(secrets / "tls.crt", secrets / "tls.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    while sides:
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                pass


def test_sidecars_that_are_there_are_kept_and_brought_up_to_date(scripts):
    scripts.changed = {"SIDECARS": "2"}
    scripts.standins.reply(("instances list", ["revseg-7b-sidecar-1"]), ("--command=true", [255, ""]))
    code, _, err = scripts.run("sidecar/create.sh")
    assert code == 0, err
    (create,) = [call for call in scripts.standins.calls() if "create" in call]
    assert create[1:5] == ["compute", "instances", "create", "revseg-7b-sidecar-0"]
    assert "revseg-7b-sidecar-1" not in create and "--provisioning-model=SPOT" in create
    copied = [call for call in scripts.standins.calls() if "scp" in call]
    assert [call[-3] for call in copied] == ["revseg-7b-sidecar-0:.revseg/", "revseg-7b-sidecar-1:.revseg/"]
    assert not any("ca.key" in word for call in copied for word in call)  # it could sign for anyone
    handshake(scripts.secrets, "revseg-7b-sidecar-1.us-east5-a.c.my-project.internal")
    scripts.run("sidecar/delete.sh")
    assert scripts.standins.calls()[-1][3:6] == ["delete", "revseg-7b-sidecar-0", "revseg-7b-sidecar-1"]


# --- GKE, images -----------------------------------------------------------------------------------------------------


def test_gke_applies_secrets_sidecars_and_the_trainer(scripts):
    scripts.changed = {"SIDECARS": "2", "SLICES": "3", "TAG": "v1"}
    scripts.standins.reply(("create secret", ["kind: Secret"]))
    arguments = ARGUMENTS[:2] + ["data.train=[gs://b/clips]"]
    scripts.changed["TRAIN_ARGUMENTS"] = f"({' '.join(map(shlex.quote, arguments))})"
    code, _, err = scripts.run("gke/train.sh")
    assert code == 0, err
    made = [call[4:7] for call in scripts.standins.calls() if "create" in call]
    assert [words[1] for words in made] == ["revseg-sidecar-tls", "revseg-sidecar-token", "revseg-7b-trainer"]
    applied = [document for text in scripts.standins.stdin("kubectl") for document in yaml.safe_load_all(text)]
    assert [document["kind"] for document in applied] == ["Secret"] * 3 + ["Service", "StatefulSet", "JobSet"]
    assert "${" not in str(applied)
    sidecars, jobset = applied[-2:]
    assert sidecars["spec"]["replicas"] == 2
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert slices["replicas"] == 3 and slices["template"]["spec"]["parallelism"] == 16
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
    (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
    assert container["image"].endswith("/tpu:v1") and container["resources"]["limits"] == {"google.com/tpu": 4}
    tracker = "tracker.endpoints=[sidecar-0.sidecar:50051,sidecar-1.sidecar:50051]"
    assert container["args"][: len(arguments) + 2] == ["train", *arguments, tracker]
    handshake(scripts.secrets, "sidecar-1.sidecar")
    scripts.standins.reply(("create secret", [1]))
    assert scripts.run("gke/train.sh")[0] != 0


def test_xpk_gets_the_same_image_and_arguments(scripts):
    code, _, err = scripts.run("gke/xpk.sh")
    assert code == 2 and "mounts no secrets" in err
    scripts.changed = {"SIDECARS": "0"}
    assert scripts.run("gke/xpk.sh")[0] == 0
    (call,) = scripts.standins.calls()
    assert call[:3] == ["xpk", "workload", "create"] and "--tpu-type=v5p-128" in call
    assert shlex.split(remote_command(call)) == ["preemptible.sh", "revseg", "train", *ARGUMENTS]


def test_images_are_built_from_targets_that_exist(scripts):
    assert scripts.run("images.sh")[0] == 0
    built = [call[call.index("--target") + 1] for call in scripts.standins.calls() if "build" in call]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert built == ["tpu", "cuda", "sidecar"] and all(f" AS {target}\n" in dockerfile for target in built)
    sources = [line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY ")]
    assert all((ROOT.parent / source).exists() for line in sources for source in line)
    assert scripts.run("images.sh", "rocm")[0] == 2
    scripts.standins.reply(("docker build", [1]))
    assert scripts.run("images.sh", "tpu")[0] == 1 and scripts.standins.calls()[-1][1] == "build"


# --- GPUs ------------------------------------------------------------------------------------------------------------

SAVES_ON_SIGTERM = """#!/usr/bin/env bash
[[ $1 == --overlap ]] && exec sleep 1000
trap 'exit 0' TERM
echo started
while true; do sleep 0.1; done
"""


@pytest.mark.parametrize("code", [0, 1, 2])
def test_preemptible_passes_exit_codes_through(scripts, code):
    assert scripts.run("preemptible.sh", "bash", "-c", f"exit {code}")[0] == code


def test_a_trainer_that_saved_after_sigterm_has_not_finished(scripts):
    scripts.standins.script("revseg", SAVES_ON_SIGTERM)
    for name, arguments in (("preemptible.sh", ["revseg"]), ("gpu/node.sh", [])):
        process = scripts.start(name, *arguments)
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode == 75


def test_a_signal_before_the_trainer_is_known_reaches_it():
    """It comes between the start of the trainer and the shell's next command."""
    signalled = """trap '[[ $BASH_COMMAND == "child=$"* ]] && kill -TERM $$' DEBUG"""
    words = f"source {shlex.quote(str(ROOT / 'preemptible.sh'))}; set -T; {signalled}; preemptible sleep 1000"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, "")


def test_a_node_trains_with_the_settings_words(scripts):
    assert scripts.run("gpu/node.sh")[0] == 0
    assert scripts.standins.calls() == [["revseg", "train", *ARGUMENTS]]
    scripts.standins.reply(("revseg train", [1]))
    assert scripts.run("gpu/node.sh")[0] == 1


TELLS_ITS_CONFIG = """#!/usr/bin/env bash
while [[ $1 != --config ]]; do shift; done
echo "$PWD" && exec ls "$2"
"""


def sidecars_stay(scripts) -> None:
    """srun does not return from starting them."""
    (scripts.standins.folder / "srun").rename(scripts.standins.folder / "recorded")
    scripts.standins.script("srun", '#!/bin/sh\n[ "$1" = --overlap ] && exec sleep 1000\nexec recorded "$@"\n')


@pytest.mark.parametrize("name", ["gpu/node.sh", "gpu/slurm_job.sh"])
def test_configs_of_the_checkout_are_found_from_any_folder(scripts, name):
    """The settings are named as seen from the caller's folder, which the job leaves."""
    scripts.changed = {"SLURM_SIDECAR_CHECKPOINT": ""}
    for tool in ("revseg", "srun"):
        scripts.standins.script(tool, TELLS_ITS_CONFIG)
    code, out, err = scripts.run(name, "--settings", "my settings.env", SLURM_JOB_ID="7")
    assert code == 0, err
    assert out.splitlines() == [str(ROOT.parent), "configs/revseg_7b.yaml"]
    _, out, _ = scripts.run(name, "--dry-run")
    assert shlex.split(out.splitlines()[0]) == ["+", "cd", str(ROOT.parent)]


def test_a_slurm_job_finds_settings_named_from_another_folder(scripts):
    scripts.standins.reply((HOSTS, ["n1"]))
    sidecars_stay(scripts)
    code, _, err = scripts.run("gpu/slurm_job.sh", "--settings", "my settings.env", SLURM_JOB_ID="7")
    assert code == 0, err
    handshake(scripts.secrets, "n1")  # secrets.sh has read them too


def test_the_settings_as_they_come_pay_for_no_sidecar_that_nothing_asks(scripts):
    names = '"$SIDECARS" "$SLURM_SIDECAR_CHECKPOINT" "${TRAIN_ARGUMENTS[@]}"'
    command = ["bash", "-c", f"source {shlex.quote(str(ROOT / 'settings.env'))}; printf '%s\\n' {names}"]
    sidecars, checkpoint, option, config, *overrides = subprocess.check_output(command, text=True).splitlines()
    assert option == "--config"
    config = load_config(ROOT.parent / config, overrides)
    assert config.rewards.mask == 0 and config.run.evaluate_every == 0
    assert (sidecars, checkpoint) == ("0", "")


def test_slurm_submits_a_job_that_the_signal_reaches(scripts):
    scripts.changed = {"SLURM_ARGUMENTS": "(--partition=gpu --account='my group')"}
    assert scripts.run("gpu/slurm.sh")[0] == 0
    (call,) = scripts.standins.calls()
    assert {"--nodes=4", "--ntasks-per-node=8", "--signal=B:TERM@120", "--requeue", "--account=my group"} <= set(call)
    wrapped = shlex.split(call[-1].removeprefix("--wrap="))
    assert wrapped == ["exec", str(ROOT / "gpu/slurm_job.sh"), "--settings", str(scripts.folder / "my settings.env")]
    scripts.standins.reply(("sbatch", [1]))
    assert scripts.run("gpu/slurm.sh")[0] == 1


def test_a_slurm_job_starts_sidecars_and_tells_the_trainers(scripts):
    scripts.standins.reply((HOSTS, ["n1\nn2"]), ("sidecar --check", [1, ""]), ("--kill-on-bad-exit", [1, ""]))
    sidecars_stay(scripts)
    code, _, err = scripts.run("gpu/slurm_job.sh", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]")
    assert code == 1, err  # the trainer's own
    train = scripts.standins.calls()[-1]
    words = train[train.index("train") + 1 :]
    assert words[: len(ARGUMENTS)] == ARGUMENTS and words[len(ARGUMENTS)] == "tracker.endpoints=[n1:50051,n2:50051]"
    handshake(scripts.secrets, "n2")


# As Slurm's own: SIGTERM makes it kill its tasks, whatever these would do; they are told by scancel.
SRUN = """#!/usr/bin/env bash
[[ $1 == --overlap ]] && exec sleep 1000
trainer & task=$!
echo $task >"$HOME/task"
trap 'kill -KILL $task; exit 143' TERM
wait $task
exit $?
"""
SCANCEL = """#!/usr/bin/env bash
[[ $* == "--signal=TERM 7.1" ]] && kill -TERM "$(cat "$HOME/task")"
"""


def test_a_slurm_job_that_was_told_to_end_is_queued_again(scripts):
    saved = scripts.folder / "saved"
    scripts.standins.script("trainer", SAVES_ON_SIGTERM.replace("exit 0", f"echo >>{shlex.quote(str(saved))}; exit 0"))
    scripts.standins.script("srun", SRUN)
    scripts.standins.script("scancel", SCANCEL)
    scripts.standins.reply((HOSTS, ["n1"]))
    for restarts, code in (("3", 75), ("20", 1)):
        process = scripts.start("gpu/slurm_job.sh", SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts)
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode == code
    requeued = [call for call in scripts.standins.calls() if call[:2] == ["scontrol", "requeue"]]
    assert requeued == [["scontrol", "requeue", "7"]]
    assert saved.read_text() == "\n\n"  # both times


def test_trainers_of_a_slurm_job_get_the_cores_that_were_asked_for(scripts):
    """srun does not take them from sbatch."""
    scripts.changed = {"SLURM_SIDECAR_CHECKPOINT": ""}
    scripts.standins.script("srun", '#!/bin/sh\necho "cores $SRUN_CPUS_PER_TASK"\n')
    for environment, words in (({"SLURM_CPUS_PER_TASK": "12"}, "cores 12\n"), ({}, "cores \n")):
        assert scripts.run("gpu/slurm_job.sh", SLURM_JOB_ID="7", **environment)[:2] == (0, words)
