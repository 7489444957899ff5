"""Several stores to evaluate on, each under its name: what is logged, which one decides, and which names are refused."""

import json
import math
from dataclasses import replace

import pytest
from one_rank import one_rank
from train_setup import make_rows, make_store, make_world, run_config

from options import NamedStore
from store.errors import InputError
from train.run import train


def test_each_store_is_evaluated_by_its_name_and_the_first_decides(tmp_path, capsys):
    """The policy stays the reference, so a loss is that of the shift which a store's chosen sides have: -log sigmoid(-beta shift)."""
    world = make_world(tmp_path, 8)
    make_store(tmp_path / "moved", world.model, make_rows(6, seed=1), shift=2.0)
    make_store(tmp_path / "other", world.model, make_rows(5, seed=2))
    config = run_config(
        tmp_path,
        learning_rate=1e-30,
        max_steps=1,
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        eval_ref_store=(f"eval_far.off={tmp_path / 'moved'}", tmp_path / "other"),
    )
    with one_rank():
        train(config)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    expected = {"eval_far.off": -math.log(1 / (1 + math.exp(0.1 * 2.0))), "other": math.log(2)}
    logged = {name: value for entry in run["log_history"] for name, value in entry.items() if name.startswith("eval")}
    losses = {name.removeprefix("eval_").removesuffix("_loss"): logged[name] for name in logged if name.endswith("_loss")}
    assert losses == pytest.approx(expected, abs=1e-5)
    assert logged["eval_eval_far.off_rewards/margins"] == pytest.approx(-0.2, abs=1e-5)
    assert logged["eval_other_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert not any(name.startswith(("eval_rewards", "eval_logps")) for name in logged)  # of which store?
    assert run["num_eval_pairs"] == 11
    assert run["best"] == {"step": 1, "metric": "eval_far.off_loss", "value": pytest.approx(expected["eval_far.off"], abs=1e-5)}
    said = capsys.readouterr().out
    assert f"step 1/1 · eval eval_far.off loss {expected['eval_far.off']:.4f}\n" in said
    assert f"step 1/1 · eval other loss {expected['other']:.4f}\n" in said


def test_names(tmp_path):
    config = run_config(tmp_path, eval_ref_store=tmp_path / "one")
    assert config.eval_stores == {"": tmp_path / "one"}  # as it is logged where there is one: eval_loss
    assert replace(config, eval_ref_store=str(tmp_path / "one")).eval_stores == config.eval_stores  # as an earlier run.json has it
    assert replace(config, eval_ref_store=None).eval_stores == {}
    two = replace(config, eval_ref_store=(f"{tmp_path}/a", f"b=x={tmp_path}"))
    assert {name: str(path) for name, path in two.eval_stores.items()} == {"a": f"{tmp_path}/a", "b": f"x={tmp_path}"}
    with pytest.raises(InputError, match="two stores of one name.*NAME=PATH"):
        replace(config, eval_ref_store=(f"{tmp_path}/a", f"{tmp_path}/b/a"))
    assert NamedStore().convert("a.b-c_d=store/x", None, None) == "a.b-c_d=store/x"
    assert NamedStore().convert("runs/x=1/store", None, None) == "runs/x=1/store"  # a path, not a name
