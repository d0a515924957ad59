"""The miniatures of the paper's ablations: their cells, their statistics, and one small table from end to end."""

import json
from pathlib import Path

import pytest

from revseg_jax import cli, reproduce
from revseg_jax.config import load_config
from revseg_jax.errors import InputError
from revseg_jax.policy.checkpoint import load_policy
from revseg_jax.reproduction.results import held, markdown, summary, terminal
from revseg_jax.reproduction.tables import TABLES, Order
from revseg_jax.rollout.layout import PromptEncoder

CONFIG = str(Path(__file__).parents[1] / "configs/demo.yaml")


@pytest.mark.parametrize("name", TABLES)
def test_cells_are_configs_that_differ(name):
    table, loaded = TABLES[name], load_policy("embedded")
    runs, evaluations = {}, []
    for cell in table.cells:
        run = load_config(CONFIG, ["run.dir=x", *table.overrides, *cell.overrides])
        assert runs.setdefault(cell.run, run) == run or not cell.run  # cells that share a run have the same config
        evaluated = load_config(CONFIG, ["run.dir=x", *table.overrides, *cell.overrides, *cell.shown])
        evaluations.append((cell.run, evaluated))
        encoder = PromptEncoder(loaded.tokenizer, loaded.policy.config, evaluated.chain)
        encoder.prefix("which object enters the scene last?", evaluated.chain.frames, 4.0)  # it fits
    assert all(one not in evaluations[:i] for i, one in enumerate(evaluations))
    assert len({cell.name for cell in table.cells}) == len(table.cells)


@pytest.mark.parametrize("name", TABLES)
def test_the_papers_own_numbers_stand_in_the_orders_that_are_checked(name):
    table = TABLES[name]
    for at in range(len(table.benchmarks)):
        numbers = {cell.name: cell.paper[at] for cell in table.cells}
        assert all(held(order, numbers) for order in table.orders)


def test_orders_are_strict():
    order = Order("jf", (("a",), ("b", "c")))
    assert held(order, {"a": 3, "b": 2, "c": 1}) and held(order, {"a": 3, "b": 1, "c": 2})
    assert not held(order, {"a": 3, "b": 3, "c": 1}) and not held(order, {"a": 3, "b": 1, "c": 4})


def scores(jf: dict[str, list[float]]) -> dict:
    return {name: {seed: dict.fromkeys(reproduce.KEPT, v) for seed, v in enumerate(vs)} for name, vs in jf.items()}


def test_means_spreads_and_orders_by_hand():
    table = TABLES["reward"]
    results = summary(table, scores({"none": [40, 44, 42], "binary": [45, 43, 47], "soft": [50, 50, 50]}))
    cells = results["cells"]
    assert [cells[name]["mean"]["jf"] for name in ("none", "binary", "soft")] == [42, 45, 50]
    assert [cells[name]["spread"]["jf"] for name in ("none", "binary", "soft")] == [2, 2, 0]
    assert [(order["held"], order["seeds_held"]) for order in results["orders"]] == [(True, 2)] * 2
    text = terminal(results)
    assert "42.0 ± 2.0" in text and "54.7" in text and "held on average, in 2 of 3 seeds: J&F: soft" in text
    assert "| binary | 45.0 ± 2.0 |" in markdown(results)
    single = summary(table, scores({"none": [50], "binary": [45], "soft": [44]}))
    assert single["cells"]["none"]["spread"]["jf"] == 0
    assert "DID NOT HOLD on average, in 0 of 1 seeds" in terminal(single)


def test_seeds_are_numbers(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "chain", "--seeds", "0;1", "--config", CONFIG])
    assert stop.value.code == 2 and "--seeds 0;1" in capsys.readouterr().err


def test_another_table_s_folder_is_refused_before_a_sidecar_is_started(tmp_path):
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain/settings.json").write_text("{}")
    with pytest.raises(InputError, match="holds results with another .*parameters.*: choose another --out"):
        reproduce.main("chain", [3], str(tmp_path), (8, 4), [CONFIG], ["tracker.checkpoint=/nowhere.pt"])


def test_a_small_table_from_end_to_end_and_again(tmp_path, capsys):
    out, name = tmp_path / "out", "chain"
    small = ["run.steps=2", "rollout.prompts_per_step=2", "rollout.group_size=2", "data.test_clips=4"]
    command = ["reproduce", name, "--seeds", "3", "--out", str(out), "--clips", "8", "4", "--config", CONFIG, *small]
    cli.main(command)
    printed = capsys.readouterr().out
    assert all(f"\n{cell.name} " in printed for cell in TABLES[name].cells)
    folder = out / name
    first = json.loads((folder / "results.json").read_text())
    assert list(first["cells"]) == [cell.name for cell in TABLES[name].cells] and first["seeds"] == [3]
    trained = {cell.run for cell in TABLES[name].cells if cell.run}
    digests = {run: (folder / "seed_3" / run / "digests.jsonl") for run in trained}
    assert all(len(path.read_text().splitlines()) == 2 for path in digests.values())

    # A trained cell whose scores are missing gets them from its checkpoint; what is finished stays untouched.
    records = sorted((folder / "seed_3").glob("*.json"))
    records[-1].unlink()
    times = {path: path.stat().st_mtime_ns for path in [*records[:-1], *digests.values()]}
    cli.main(command)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert json.loads((folder / "results.json").read_text()) == first

    with pytest.raises(InputError, match="another learner"):
        reproduce.main(name, [3], str(out), (8, 4), [CONFIG], [*small, "learner.learning_rate=1"])
