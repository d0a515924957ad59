"""Nothing that is drawn depends on anything but the run's seed: a search through the source."""

import ast
from pathlib import Path

import pytest

import revseg_jax

PACKAGE = Path(revseg_jax.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc")))
SEEDED = {"default_rng", "Generator", "PCG64", "SeedSequence", "BitGenerator"}  # of np.random; need a seed
# Names that draw from, or seed, something global, or that no run repeats.
FORBIDDEN = {"random", "secrets", "uuid", "os.urandom", "torch.seed", "time.time_ns", "hash", "id"}
# Where one of them is right: it decides nothing that is computed.
ALLOWED = {
    ("tracker/connection.py", "random"),  # clients that were told to wait do not all come back together
    ("tracker/connection.py", "random.uniform"),
    ("run/mirror.py", "uuid"),  # names the trainer that owns a run in a store
    ("run/mirror.py", "uuid.uuid4"),
    ("policy/attention_kernels.py", "hash"),  # of a mask, by which JAX finds a program that it has compiled
}
# Clocks may be read for what they say, never for what is drawn.
CLOCKS = {"time.time", "time.monotonic", "time.perf_counter"}
SEEDS = {"default_rng", "SeedSequence", "PCG64", "key", "PRNGKey", "fold_in", "manual_seed", "seed"}


def findings(tree: ast.AST) -> set[str]:
    """What of a module's source could make a draw depend on something else than the seed."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & FORBIDDEN
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN | {"numpy.random"}:
            found.add(node.module)
        elif isinstance(node, ast.Call):
            found |= _call(node)
        elif isinstance(node, ast.For | ast.comprehension) and _is_set(node.iter):
            found.add("a loop over a set")
    return found


def _call(node: ast.Call) -> set[str]:
    name = _name(node.func)
    head, _, last = name.rpartition(".")
    if head in ("np.random", "numpy.random"):
        good = last in SEEDED and (node.args or node.keywords)
        return set() if good else {name}
    if name in FORBIDDEN or name.split(".")[0] in ("random", "secrets", "uuid"):
        return {name}
    if name.startswith("torch.") and last in ("rand", "randn", "randint", "randperm", "normal", "multinomial"):
        return set() if any(word.arg == "generator" for word in node.keywords) else {name}
    if last in ("list", "tuple", "enumerate") and node.args and _is_set(node.args[0]):
        return {f"{last} of a set"}
    if last in SEEDS:
        inside = {_name(call.func) for value in node.args for call in ast.walk(value) if isinstance(call, ast.Call)}
        return {f"{name} of a clock"} if inside & (CLOCKS | {"time.time_ns"}) else set()
    return set()


def _is_set(node: ast.AST) -> bool:
    """Hash order: that of strings differs from process to process. `sorted` makes it harmless."""
    return isinstance(node, ast.Set | ast.SetComp) or (
        isinstance(node, ast.Call) and _name(node.func) in ("set", "frozenset")
    )


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_draw_comes_from_a_seed(path):
    module = path.relative_to(PACKAGE).as_posix()
    found = findings(ast.parse(path.read_text()))
    assert {what for what in found if (module, what) not in ALLOWED} == set()


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from numpy.random import rand",
        "np.random.seed(0)",
        "np.random.shuffle(x)",
        "np.random.default_rng()",
        "np.random.default_rng(time.time_ns())",
        "jax.random.key(int(time.time()))",
        "torch.randn(3)",
        "os.urandom(8)",
        "key = hash(name) % 7",
        "for name in {'a', 'b'}: pass",
        "[x for x in set(names)]",
        "names = list(set(names))",
    ],
)
def test_the_search_finds(source):
    assert findings(ast.parse(source))


def test_the_search_lets_seeded_draws_pass():
    source = (
        "np.random.default_rng([seed, 1]).normal(); sorted(set(x)); torch.rand(3, generator=g); jax.random.key(seed)"
    )
    assert not findings(ast.parse(source))
