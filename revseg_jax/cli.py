"""The `revseg` command. Heavy imports wait until the command is known, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from importlib.util import find_spec

from revseg_jax.errors import InputError, RunFailure
from revseg_jax.parallel.device_memory import explain_full_memory
from revseg_jax.paths import cache_folder, local_only
from revseg_jax.run.interruption import Interrupted, ended_by_sigterm, swallowed_signals_sent_again

# Files of an option: shells leave the ~ of --token-file=~/token alone.
FILE, PEM = ({"type": os.path.expanduser, "metavar": name} for name in ("FILE", "PEM"))
NAMED = {"type": os.path.expanduser, "default": "embedded"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all our errors are, and whose key=value words may stand anywhere."""

    def error(self, message: str):
        self.exit(2, f"revseg: error: {message} (see {self.prog} --help)\n")

    def parse_args(self, arguments: list[str] | None = None, namespace: argparse.Namespace | None = None):
        # Behind a positional argument and an option argparse takes no more words for a list that may be empty.
        options, rest = self.parse_known_args(arguments, namespace)
        if rest:
            if not hasattr(options, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
                options.command.error(f"unrecognized arguments: {' '.join(rest)}")
            options.overrides = [*options.overrides, *rest]
        return options


class ShowVersion(argparse.Action):
    """Looks it up when it is asked for: a checkout that is not installed has none, but commands all the same."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"revseg-jax {version('revseg-jax')}")
        parser.exit()


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    # JAX, TensorFlow-free TFDS and gRPC log to stderr on their own; a user should see this program's lines.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log has no use for progress bars
    if not options.debug:
        import absl.logging

        absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs tracebacks of errors that it then raises
    # A run that goes on, on this machine or another with the same cache, need not compile again.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache_folder(), "compilations"))
    spare_absent_chips()
    try:
        with swallowed_signals_sent_again():
            options.run(options)
    except (InputError, RunFailure) as error:
        if options.debug:
            raise
        print(f"revseg: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a further one ends what Python still does at its exit
        print(f"revseg: interrupted{f'; {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        sys.exit(130)
    except Interrupted as interrupt:
        print(f"revseg: stopped by SIGTERM{f'; {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        sys.exit(143)
    except MemoryError:
        if options.debug:
            raise
        print("revseg: error: this machine's memory is full", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if options.debug or error.filename is None:
            raise
        print(f"revseg: error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:  # as JAX's errors are
        explained = explain_full_memory(error)
        if options.debug or explained is None:
            raise
        print(f"revseg: error: {explained}", file=sys.stderr)
        sys.exit(1)


def spare_absent_chips() -> None:
    """Where JAX's packages for TPUs and GPUs are installed only to compile for them, it would look for the chips:
    libtpu complains on stderr then, and the plugin for CUDA 13 crashes where there is no driver."""
    from revseg_jax.parallel.startup import CUDA_PLUGINS, gpu_driver, tpu_attached

    gpu_packages = any(map(find_spec, CUDA_PLUGINS))
    if (gpu_packages or find_spec("libtpu")) and not (gpu_packages and gpu_driver()) and not tpu_attached():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return int(text)


def at_least_one(text: str) -> int:
    if not count(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def parser() -> Parser:
    root = Parser(prog="revseg", description="Reasoning video object segmentation, trained by reinforcement learning.")
    root.add_argument("--version", action=ShowVersion, nargs=0, help="show the package's version and exit")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.set_defaults(run=run, command=sub)
        return sub

    def configurable(sub: argparse.ArgumentParser, default: str | None = None) -> None:
        layers = "YAML file; given again, it is laid over the ones before"
        sub.add_argument("--config", action="append", help=f"{layers} (default: {default or 'none'})")
        sub.set_defaults(default_config=default)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change, such as run.steps=100")

    demo = command("demo", run_demo, "Train and evaluate the tiny policy on synthetic clips and write a report.")
    demo.add_argument("--seed", type=int, default=0)
    configurable(demo, "configs/demo.yaml")
    configurable(command("train", run_train, "Post-train a policy; goes on when the run folder has a checkpoint."))
    ahead = command("compile", run_compile, "Compile a training step for TPUs or GPUs that need not be there.")
    ahead.add_argument(
        "--topology",
        required=True,
        help="such as v5p:4x4x4 or h200:8; with mesh.slice=N, of each of N slices or machines",
    )
    ahead.add_argument(
        "--programs", default="all", help="prefill, decode, turn2, decode2, score, update; names with commas between"
    )
    ahead.add_argument("--json", action="store_true", help="one JSON object as the last line")
    configurable(ahead)
    evaluate = command("evaluate", run_evaluate, "Run a policy on benchmarks and score its masks.")
    evaluate.add_argument("--policy", help="checkpoint folder in Hugging Face layout (policy.path)")
    evaluate.add_argument("--tracker", help="SAM2 checkpoint (tracker.checkpoint)")
    evaluate.add_argument("--tracker-config", help="config of that checkpoint (tracker.config)")
    evaluate.add_argument("--data", action="append", default=[], help="prepared folder, or one that holds such")
    evaluate.add_argument("--benchmarks", default="all", help="names with commas between (default: all with data)")
    evaluate.add_argument("--out", required=True, help="folder for predictions and results; it is gone on with")
    evaluate.add_argument("--sampled", action="store_true", help="draw answers as rollout.* says, not greedily")
    evaluate.add_argument("--workers", type=count, default=0, help="processes that score (default: one a core)")
    configurable(evaluate)

    reproduce = command("reproduce", run_reproduce, "Run one of the paper's ablations in small, on synthetic clips.")
    reproduce.add_argument("table", choices=("chain", "reward", "frames"))
    reproduce.add_argument("--seeds", default="0,1,2", help="with commas between (default: %(default)s)")
    reproduce.add_argument("--out", default="runs/reproduce", help="is gone on with (default: %(default)s)")
    reproduce.add_argument("--clips", type=int, nargs=2, default=(400, 96), metavar=("TRAIN", "TEST"), help="a seed")
    configurable(reproduce, "configs/demo.yaml")

    score = command("score", run_score, "Score anybody's predictions: DIR/<video>/<expression>/<frame>.png.")
    score.add_argument("predictions", metavar="DIR")
    score.add_argument("--benchmark", required=True)
    score.add_argument("--data", action="append", default=[], required=True, help="prepared folder of the benchmark")
    score.add_argument("--submission", metavar="ZIP", help="check the files and write the zip for the server")
    score.add_argument("--workers", type=count, default=0, help="processes (default: one a core)")

    prepare = command("prepare", run_prepare, "Turn a downloaded dataset into clips that stream into training.")
    prepare.add_argument("dataset", help="ref_youtube_vos, ref_davis17, mevis, revos, lv_vis, reason_vos, reason_seg, "
                         "or synthetic")  # fmt: skip
    prepare.add_argument("--source", help="the dataset's own folder, as it was downloaded")
    prepare.add_argument("--out", required=True, help="new folder of array_record files")
    prepare.add_argument("--split", action="append", default=[], help="may be repeated (default: all there are)")
    prepare.add_argument("--strict", action="store_true", help="stop at the first problem in the data")
    prepare.add_argument("--workers", type=count, default=0, help="processes (default: one a core)")
    prepare.add_argument("--difficulty", default="easy", help="synthetic: easy, medium or hard")
    prepare.add_argument("--clips", type=int, nargs=2, default=(400, 96), metavar=("TRAIN", "TEST"), help="synthetic")
    prepare.add_argument("--seed", type=int, default=0, help="synthetic")

    drop = command("filter", run_filter, "Drop training videos whose objects SAM2 cannot segment from their true box.")
    drop.add_argument(
        "folder", metavar="PREPARED", help="folder written by revseg prepare; its train split is filtered"
    )
    drop.add_argument("--threshold", type=float, default=0.6, help="least mean mask IoU (default: %(default)s)")
    configurable(drop)

    segment = command("segment", run_segment, "Answer a question about a video with masks.")
    segment.add_argument("video", help="a video file or a folder of frames")
    segment.add_argument("query", help='such as "which vehicle suits a family outing?"')
    segment.add_argument("--out", required=True, help="new folder for masks/, overlay.mp4 and trace.json")
    segment.add_argument("--policy", default="embedded", help="checkpoint folder in Hugging Face layout")
    segment.add_argument("--tracker", **NAMED, help="SAM2 checkpoint")
    segment.add_argument("--tracker-config", **NAMED, help="config of that checkpoint")
    segment.add_argument("--endpoint", action="append", default=[], help="host:port of a running sidecar")
    segment.add_argument("--tls-ca", **PEM, default="", help="the authority of that sidecar's certificate")
    segment.add_argument("--token-file", **FILE, default="", help="holds that sidecar's bearer token")

    sidecar = command("sidecar", run_sidecar, "Serve SAM2 masks and mask rewards over gRPC.")
    sidecar.add_argument("--host", default="127.0.0.1")
    sidecar.add_argument("--port", type=int, default=50051, help="0 takes any free port")
    sidecar.add_argument("--checkpoint", **NAMED)
    sidecar.add_argument("--config", **NAMED)
    sidecar.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    sidecar.add_argument("--threads", type=count, default=None)
    sidecar.add_argument("--tls-certificate", **PEM, help="serve TLS; with --check: the certificate to show")
    sidecar.add_argument("--tls-key", **PEM, help="key of that certificate")
    sidecar.add_argument("--tls-client-ca", **PEM, help="serve only clients with a certificate it signed")
    sidecar.add_argument("--token-file", **FILE, help="serve only calls with the bearer token in it")
    sidecar.add_argument("--insecure", action="store_true", help="listen beyond this machine without TLS or token")
    sidecar.add_argument("--feature-mebibytes", type=int, default=2048, help="of image features kept on the device")
    sidecar.add_argument("--host-feature-mebibytes", type=int, help="of those a GPU has no room for (default: 8192)")
    sidecar.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics there")
    sidecar.add_argument("--check", action="store_true", help="exit 0 when a sidecar serves there, else 1")
    sidecar.add_argument("--tls-ca", **PEM, help="with --check: the authority of the sidecar's certificate")
    sidecar.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # ends when that process is gone

    doctor = command("doctor", run_doctor, "Say what this machine has and what is missing, with the remedies.")
    configurable(doctor)

    verify = command("verify", run_verify, "Take a run's first steps again and compare them bit for bit.")
    verify.add_argument("folder", metavar="RUN")
    verify.add_argument("--steps", type=at_least_one, default=3, help="of its first (default: %(default)s)")

    export = command("export", run_export, "Write a run's policy in Hugging Face layout.")
    export.add_argument("folder", metavar="RUN")
    export.add_argument("--out", required=True)
    export.add_argument("--best", action="store_true", help="the checkpoint with the best J&F, not the newest")

    report = command("report", run_report, "Write a run's report.html, or comparison.html beside several runs.")
    report.add_argument("folders", metavar="RUN", nargs="+")

    assets = command("make-assets", run_make_assets, "Train the embedded policy or tracker from scratch.")
    assets.add_argument("which", choices=("policy", "tracker"))
    assets.add_argument("--out", required=True)
    assets.add_argument("--seed", type=int, default=0)
    assets.add_argument("--start", help="policy: a policy folder to go on from, with --stages")
    assets.add_argument("--stages", default="", help="policy: names of the stages to run, all by default: A,B,...")
    assets.add_argument("--minutes", type=float, default=40.0, help="tracker: 60 steps each, however long they take")
    assets.add_argument("--config", default="configs/demo.yaml", help="policy: where its prompts and sizes come from")
    return root


def run_demo(options: argparse.Namespace) -> None:
    config = load(options, [f"run.seed={options.seed}"])
    local_only(config.run.dir)
    from revseg_jax import demo

    demo.main(config)


def run_train(options: argparse.Namespace) -> None:
    config = load(options)
    from revseg_jax.parallel.startup import start_processes

    print(start_processes())
    from revseg_jax import train
    from revseg_jax.parallel.processes import failing_together
    from revseg_jax.rollout.loading import spoken_chain

    with failing_together():  # each process reads the policy's files by itself
        config = spoken_chain(config, options.config or [], options.overrides)
    train.main(config)


def run_compile(options: argparse.Namespace) -> None:
    config = load(options, ["run.dir=."])
    # libtpu asks no metadata server and takes no chip: it only compiles.
    quiet = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}  # it warns when it knows neither
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in (alone | quiet).items():
        os.environ.setdefault(name, value)
    from revseg_jax import compile
    from revseg_jax.rollout.loading import spoken_chain

    config = spoken_chain(config, options.config or [], options.overrides)
    names = [] if options.programs == "all" else options.programs.split(",")
    compile.main(config, options.topology, names, options.json)


def run_evaluate(options: argparse.Namespace) -> None:
    local_only(options.out)
    named = {"policy.path": options.policy, "tracker.checkpoint": options.tracker}
    named |= {"tracker.config": options.tracker_config}
    config = load(options, ["run.dir=.", *(f"{key}={value}" for key, value in named.items() if value is not None)])
    if options.data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=options.data))
    from revseg_jax import evaluate
    from revseg_jax.rollout.loading import spoken_chain, with_inference_dtypes

    given = options.config or [], options.overrides
    config = with_inference_dtypes(spoken_chain(config, *given), *given)
    evaluate.main(config, options.benchmarks.split(","), options.out, options.sampled, options.workers)


def run_reproduce(options: argparse.Namespace) -> None:
    if not all(seed.isdecimal() for seed in options.seeds.split(",")):
        raise InputError(f"--seeds {options.seeds}: write numbers with commas between, such as 0,1,2")
    seeds = sorted({int(seed) for seed in options.seeds.split(",")})
    from revseg_jax import reproduce

    configs = options.config or [options.default_config]
    reproduce.main(options.table, seeds, options.out, tuple(options.clips), configs, options.overrides)


def run_score(options: argparse.Namespace) -> None:
    from revseg_jax import score

    score.main(options.predictions, options.benchmark, options.data, options.submission, options.workers)


def run_prepare(options: argparse.Namespace) -> None:
    from revseg_jax.data.datasets import DATASETS
    from revseg_jax.data.prepare import prepare, summary_text
    from revseg_jax.data.processes import cores
    from revseg_jax.data.synthetic_builder import prepare_synthetic

    there = local_only(options.out).exists()
    if options.dataset == "synthetic":
        if options.source or options.split or options.strict:
            raise InputError("--source, --split and --strict are for downloads: synthetic clips are drawn")
        prepared = prepare_synthetic(
            options.out, options.difficulty, *options.clips, seed=options.seed, workers=options.workers or cores()
        )
    elif options.source is None and options.dataset in DATASETS:
        raise InputError("--source is missing: the folder that holds the download")
    else:
        prepared = prepare(
            options.dataset, options.source or "", options.out, options.split, options.strict, options.workers
        )
    if there:
        print(
            f"revseg: {options.out} was there already and is as it was: delete it to prepare it anew", file=sys.stderr
        )
    print(summary_text(prepared, options.out))


def run_filter(options: argparse.Namespace) -> None:
    config = load(options, ["run.dir=."])
    from revseg_jax import filter

    filter.main(options.folder, options.threshold, config)


def run_segment(options: argparse.Namespace) -> None:
    local_only(options.out)
    from revseg_jax import segment

    with ended_by_sigterm():
        segment.main(
            options.video,
            options.query,
            options.out,
            policy=options.policy,
            tracker=options.tracker,
            tracker_config=options.tracker_config,
            endpoints=options.endpoint,
            token_file=options.token_file,
            tls_ca=options.tls_ca,
        )


def run_sidecar(options: argparse.Namespace) -> None:
    from revseg_jax.tracker.security import TLS, ServerTLS, read_token

    certificate = options.tls_certificate, options.tls_key
    if options.check:
        from revseg_jax.tracker.connection import check

        tls = TLS(options.tls_ca, *certificate) if options.tls_ca else None
        if not check(options.host, options.port, tls=tls):
            raise RunFailure(f"no sidecar serves at {options.host}:{options.port}")
        return
    if options.tls_client_ca and certificate == (None, None):
        raise InputError("--tls-client-ca needs --tls-certificate and --tls-key")
    tls = ServerTLS(*certificate, options.tls_client_ca) if any(certificate) else None
    token = read_token(options.token_file) if options.token_file else None
    from revseg_jax.tracker import sidecar

    sys.exit(
        sidecar.main(
            options.host,
            options.port,
            options.checkpoint,
            options.config,
            options.device,
            threads=options.threads or None,
            parent=options.parent,
            tls=tls,
            token=token,
            insecure=options.insecure,
            metrics_port=options.metrics_port,
            feature_mebibytes=options.feature_mebibytes,
            host_feature_mebibytes=options.host_feature_mebibytes,
        )
    )


def run_doctor(options: argparse.Namespace) -> None:
    config = load(options, ["run.dir=."])
    from revseg_jax import doctor

    doctor.main(config)


def run_verify(options: argparse.Namespace) -> None:
    from revseg_jax import verify

    verify.main(options.folder, options.steps)


def run_export(options: argparse.Namespace) -> None:
    from revseg_jax import export

    with ended_by_sigterm():
        export.main(options.folder, options.out, options.best)


def run_report(options: argparse.Namespace) -> None:
    from revseg_jax import report

    report.main([local_only(folder) for folder in options.folders])


def run_make_assets(options: argparse.Namespace) -> None:
    out = local_only(options.out)
    if options.which == "policy":
        from revseg_jax.config import load_config
        from revseg_jax.pretraining.asset import make_policy
        from revseg_jax.pretraining.policy_training import named_stages

        stages = named_stages(options.stages)
        start = local_only(options.start) if options.start else None
        make_policy(out, load_config(options.config), options.seed, stages, start)
    else:
        from revseg_jax.tracker.embedded_training import train_tracker

        train_tracker(out, options.seed, options.minutes)


def load(options: argparse.Namespace, first: list[str] = ()):
    from revseg_jax.config import load_config

    return load_config(options.config or options.default_config, [*first, *options.overrides])


if __name__ == "__main__":
    main()
