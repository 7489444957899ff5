"""A run refuses before it loads anything, keeps what another run made, and knows what it resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from store_samples import make_identity, make_store
from train_setup import make_tokenizer, run_config

from launch import Process
from precompute.scorer.model import tokenizer_sha256
from stop import Stopped
from store.errors import InputError, RefdpoError, StoreError
from train import record
from train.checkpoint import last_checkpoint, remove_cut_short
from train.config import TrainConfig
from train.plan import plan, policy_of
from train.ranks import join, refuse_abandoned_build
from train.reshard import must_reshard, refuse_optimizer
from train.run import train


@pytest.fixture(autouse=True)
def environment():
    """join() writes to it."""
    with mock.patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        yield


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    make_store(tmp_path / "store", make_identity(num_rows=10, max_length=64))
    return run_config(tmp_path, per_device_train_batch_size=1, effective_batch_size=1)


def altered(config: TrainConfig) -> TrainConfig:
    path = config.ref_store / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    return config


def unsealed(config: TrainConfig) -> TrainConfig:
    (config.ref_store / "_manifest.json").unlink()
    return config


def other_eval_store(config: TrainConfig) -> TrainConfig:
    make_store(config.ref_store.parent / "eval", make_identity(dtype="bfloat16"))
    return replace(config, eval_ref_store=config.ref_store.parent / "eval")


def float16(config: TrainConfig) -> TrainConfig:
    make_store(config.ref_store.parent / "half", make_identity(dtype="float16"))
    return replace(config, ref_store=config.ref_store.parent / "half")


def filled_output(config: TrainConfig) -> TrainConfig:
    config.output_dir.mkdir()
    (config.output_dir / "model.safetensors").touch()
    return config


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (altered, "part-00001.parquet"),
        (unsealed, "is not sealed"),
        (other_eval_store, "the eval store was made with another dtype"),
        (filled_output, "the output folder is not empty"),
        (lambda config: replace(config, ref_store=Path("store")), "shelf"),
        (lambda config: replace(config, ref_store=config.ref_store / "nowhere"), "no such folder"),
        (lambda config: replace(config, max_length=65), "scored for shorter sequences"),
        (lambda config: replace(config, max_length=1), "no pair is left"),
        (float16, "float16 trains on GPUs only"),
        (lambda config: replace(config, resume=True), "no checkpoint to resume from"),
        (lambda config: replace(config, num_train_epochs=1e9), "--num-train-epochs 1e.09: more epochs than can be planned"),
        (lambda config: replace(config, max_steps=10**9), "--max-steps: more epochs than can be planned"),
        (lambda config: replace(config, resume=Path("nowhere")), "no complete checkpoint of a run"),
    ],
)
def test_bad_input_stops_before_a_model_is_loaded(config, spoil, words, monkeypatch):
    config = spoil(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with mock.patch("train.run.dpo_config", side_effect=AssertionError), pytest.raises(RefdpoError, match=words):
        train(config)
    assert not (config.output_dir / record.NAME).exists()


def test_dropped_pairs_are_counted_on_screen(config, capsys):
    with mock.patch("train.run.dpo_config", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train(replace(config, max_length=20))
    assert "of 10 pairs dropped: their prompt alone fills max length 20" in capsys.readouterr().out


def test_pairs_that_are_evaluated_and_trained_on_are_counted(config, capsys):
    make_store(config.ref_store.parent / "first", make_identity(num_rows=4, max_length=64))
    stores = (f"same={config.ref_store}", f"first={config.ref_store.parent / 'first'}")
    for given, expected in (
        ({"eval_ref_store": stores}, ["10 of 10 (same)", "4 of 4 (first)"]),
        ({"eval_ref_store": stores, "where": "row in (3, 7)"}, ["2 of 10 (same)", "1 of 4 (first)"]),
        ({"eval_ref_store": stores[1:], "where": "row > 3"}, []),
        ({"eval_fraction": 0.4}, []),
    ):
        with mock.patch("train.run.dpo_config", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            train(replace(config, **given))
        said = re.findall(r"^(.* of .*) pairs to evaluate on (.*) are trained on too$", capsys.readouterr().out, re.MULTILINE)
        assert [" ".join(each) for each in said] == expected


@pytest.mark.parametrize("fraction", [None, 0.4])
def test_dropped_pairs_of_an_evaluation_are_counted_too(config, capsys, fraction):
    """With the numbers of the plan, which what is trained and evaluated on is made of."""
    stores = () if fraction is not None else (f"held={config.ref_store}", f"other={config.ref_store}")
    short = replace(config, max_length=20, eval_fraction=fraction, eval_ref_store=stores)
    planned = plan(short, world=1)
    with mock.patch("train.run.dpo_config", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train(short)
    lines = [line for line in capsys.readouterr().out.splitlines() if "to evaluate on" in line and "dropped" in line]
    asked = 10 if fraction is None else len(planned.selection.eval)
    expected = [
        f"{asked - len(rows)} of {asked} pairs to evaluate on{f' ({name})' if name else ''} dropped: their prompt alone fills max length 20"
        for name, (_, rows) in planned.evals.items()
        if len(rows) < asked
    ]
    assert lines == expected and expected


def test_default_policy_is_the_stores_model_at_its_revision(config):
    identity = make_identity()
    assert vars(policy_of(config, identity)) == {
        "name": "acme/tiny",
        "revision": "main",
        "tokenizer": "acme/tiny",
        "tokenizer_revision": "main",
        "dtype": "float32",
    }
    other = policy_of(replace(config, policy="me/other", revision="v2", dtype="bfloat16"), identity)
    assert (other.name, other.revision, other.tokenizer, other.tokenizer_revision, other.dtype) == (
        "me/other",
        "v2",
        "me/other",
        "v2",
        "bfloat16",
    )
    apart = policy_of(config, make_identity(tokenizer="acme/words"))
    assert (apart.tokenizer, apart.tokenizer_revision) == ("acme/words", None)


def test_environment_for_one_process():
    join(Process(rank=0, world=1, local_rank=0))
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 0 < int(os.environ["MASTER_PORT"]) < 65536


def test_environment_under_srun():
    os.environ |= {"SLURM_JOB_ID": "123456", "SLURM_STEP_NUM_NODES": "1"}
    join(Process(rank=3, world=4, local_rank=3))
    assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("3", str(20000 + 123456 % 20000))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ["SLURM_STEP_NUM_NODES"] = "2"
    with pytest.raises(InputError, match="MASTER_ADDR and MASTER_PORT"):
        join(Process(rank=3, world=4, local_rank=3))


def test_a_launchers_environment_is_kept():
    os.environ |= {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
    join(Process(rank=5, world=8, local_rank=1))
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["LOCAL_RANK"]) == ("node7", "29500", "1")


RUNNING_THREAD = """
#include <chrono>
#include <thread>
static std::thread thread([] { std::this_thread::sleep_for(std::chrono::seconds(60)); });  // a destructor finds it running: std::terminate
"""
COMMAND = """
import sys
import cli

library, ranks = sys.argv[1:]

@cli.main.command("end")
def end():
    import atexit, ctypes
    from torch import distributed
    from stop import Stopped
    from store.errors import InputError
    atexit.register(print, "its handlers have run")
    ctypes.CDLL(library)
    {join}
    {end}

sys.argv[1:] = ["end"]
"""
JOIN = 'distributed.init_process_group("gloo", init_method="file://" + ranks, rank=0, world_size=1)'


@pytest.fixture(scope="module")
def running_thread(tmp_path_factory) -> Path:
    """A library that aborts the process where it ends in the usual way, as Gloo's threads can."""
    library = tmp_path_factory.mktemp("library") / "thread.so"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-pthread", "-xc++", "-", "-o", library], input=RUNNING_THREAD, check=True, text=True
    )
    return library


def ended(running_thread: Path, folder: Path, run: str, **parts: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", COMMAND.format(**parts) + run, str(running_thread), str(folder / "ranks")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout == "its handlers have run\n", done.stderr
    return done


@pytest.mark.parametrize(
    ("join", "end", "code"),
    [
        (JOIN, "pass", 0),
        (JOIN, "raise SystemExit(75)", 75),
        (JOIN, "raise Stopped('told to')", 75),
        (JOIN, "raise InputError('this rank alone')", InputError.exit_code),
        (JOIN, "raise RuntimeError('a bug')", -signal.SIGABRT),
        ("pass", "pass", -signal.SIGABRT),
    ],
)
def test_a_rank_is_not_aborted_at_its_end(running_thread, tmp_path, join, end, code):
    run = "cli.run()"
    done = ended(running_thread, tmp_path, run, join=join, end=end)
    assert done.returncode == code, done.stderr


def test_a_command_in_a_process_of_others_leaves_its_end_alone(running_thread, tmp_path):
    """As in these tests: pytest's exit code would be lost."""
    run = "cli.main(standalone_mode=False, args=['end']); sys.exit(3)"
    done = ended(running_thread, tmp_path, run, join=JOIN, end="pass")
    assert done.returncode == -signal.SIGABRT, done.stderr


def started(config: TrainConfig, **changes) -> dict:
    return record.started(config, make_identity(**changes), {"dtype": "float32"}, max_length=64, batch=8)


def test_an_output_folder_is_used_once(tmp_path, config):
    folder = tmp_path / "run"
    record.refuse_other_run(folder)
    record.write(folder, started(config))
    record.refuse_other_run(folder)  # died before its first checkpoint: nothing is lost by starting again
    (folder / "checkpoint-10").mkdir()
    record.refuse_other_run(folder)  # likewise where the first checkpoint was cut short
    (folder / "checkpoint-10" / "trainer_state.json").write_text("{}")
    with pytest.raises(InputError, match="Continue its run with --resume"):
        record.refuse_other_run(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(InputError, match="Choose another --output-dir"):
        record.refuse_other_run(folder)
    with pytest.raises(InputError, match="a file, not a folder"):
        record.refuse_other_run(folder / "model.safetensors")


def test_a_run_that_died_while_it_saved_its_model_may_be_started_again(tmp_path, config):
    """Without a checkpoint (--save-strategy no) nothing in the folder is of use; a finished run is kept."""
    folder = tmp_path / "run"
    record.write(folder, started(config))
    (folder / "model.safetensors").write_bytes(b"half a mod")
    (folder / "config.json").touch()
    record.refuse_other_run(folder)
    record.write(folder, started(config) | {"status": "finished"})
    with pytest.raises(InputError, match="Choose another --output-dir"):
        record.refuse_other_run(folder)


def test_a_checkpoint_that_a_kill_cut_short_is_not_resumed_from_and_goes_away(tmp_path):
    """Also where the kill came while its last file was written."""
    for name, state in (("checkpoint-1", "{}"), ("checkpoint-2", '{"global_step": 2, "log_hist'), ("checkpoint-3", None)):
        (tmp_path / name / "global_step").mkdir(parents=True)
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    remove_cut_short(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_record_says_how_a_run_ended_early(tmp_path, config):
    for error, status in (
        (Stopped("told to"), "stopped"),
        (RuntimeError("out of memory"), "failed"),
        (KeyboardInterrupt(), "failed"),
    ):
        record.write(tmp_path, started(config))
        with pytest.raises(type(error)), record.keeping_status(tmp_path):
            raise error
        assert (record.read(tmp_path)["status"], record.finished(tmp_path)) == (status, None)
        assert type(error).__name__ in record.read(tmp_path)["error"]


def test_a_loss_that_sorts_micro_batches_keeps_their_size_on_resume(tmp_path, config):
    checkpoint = tmp_path / "run" / "checkpoint-10"
    sorting = replace(config, loss_type=("aot",))
    record.write(tmp_path / "run", started(sorting))
    record.compare_with_started(checkpoint, started(replace(sorting, gradient_checkpointing=False)))
    with pytest.raises(InputError, match="expected per_device_train_batch_size 1; found per_device_train_batch_size 4"):
        record.compare_with_started(checkpoint, started(replace(sorting, per_device_train_batch_size=4)))


def test_a_policy_that_is_gone_is_refused_at_once(config, tmp_path):
    for option, words in (("policy", "--policy"), ("tokenizer", "--tokenizer")):
        gone = replace(config, **{option: str(tmp_path / "gone")})
        with pytest.raises(InputError, match=f"{words} .*no such folder"):
            plan(gone, world=1)


def test_a_tokenizer_without_padding_is_refused_before_the_model_is_loaded(config, tmp_path):
    """The file that its advice is about does not change what the store's identity says of a tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "words")
    bare = replace(config, tokenizer=str(tmp_path / "words"))
    with (
        mock.patch("train.run.dpo_config", return_value=SimpleNamespace(device="cpu")),
        mock.patch.multiple("train.run", agree=mock.DEFAULT, schedule=mock.DEFAULT, capacity=mock.DEFAULT),
        mock.patch("train.run.load_model", side_effect=AssertionError),
        pytest.raises(InputError, match="names no token that fills up a batch.*found pad_token None, eos_token None"),
    ):
        train(bare)
    before = tokenizer_sha256(tokenizer)
    tokenizer.pad_token = "<pad>"
    assert tokenizer_sha256(tokenizer) == before


def test_a_deepspeed_file_that_contradicts_the_options_is_refused_at_once(config, tmp_path):
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 3}))
    with pytest.raises(InputError, match="contradicts the options.*expected --effective-batch-size .*; found train_batch_size 3"):
        plan(replace(config, zero_config=zero), world=1)


@pytest.fixture
def of_three_ranks(tmp_path) -> Path:
    """The names of a checkpoint's parts, as DeepSpeed gives them."""
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "global_step4").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step4")
    for rank in (0, 1, 2):
        (checkpoint / "global_step4" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    return checkpoint


@pytest.mark.parametrize("optim", [None, "adamw_torch", "sgd", "adamw_bnb_8bit"])
def test_states_that_deepspeed_does_not_convert_are_refused(of_three_ranks, optim):
    assert must_reshard(of_three_ranks, 2) and not must_reshard(of_three_ranks, 3)
    if optim in (None, "adamw_torch"):
        refuse_optimizer(of_three_ranks, optim)
        return
    with pytest.raises(InputError, match=rf"--optim {optim}: .*as many processes as before \(3\)"):
        refuse_optimizer(of_three_ranks, optim)


def test_they_are_refused_before_a_model_is_loaded(config, of_three_ranks):
    resumed = replace(plan(replace(config, optim="sgd"), world=1), checkpoint=of_three_ranks)
    with (
        mock.patch("train.run._plan", return_value=resumed),
        mock.patch("train.run.dpo_config", side_effect=AssertionError),
        pytest.raises(InputError, match="as many processes as before"),
    ):
        train(replace(config, optim="sgd"))


def test_a_warmup_that_had_no_effect_is_not_another_course(tmp_path, config):
    constant = replace(config, lr_scheduler_type="constant", warmup_ratio=0.0)
    before = started(constant)
    before["config"]["warmup_ratio"] = 0.1  # as an earlier state wrote it
    record.write(tmp_path / "run", before)
    record.compare_with_started(tmp_path / "run" / "checkpoint-10", started(constant))


def test_last_checkpoint_is_found(config):
    for step in (9, 10):
        (config.output_dir / f"checkpoint-{step}").mkdir(parents=True)
        (config.output_dir / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (config.output_dir / "checkpoint-11").mkdir()  # killed while it was written
    assert record.checkpoint_of(config) is None
    assert record.checkpoint_of(replace(config, resume=True)) == config.output_dir / "checkpoint-10"
    assert record.checkpoint_of(replace(config, resume=config.output_dir / "checkpoint-9")) == config.output_dir / "checkpoint-9"


def test_a_resumed_run_must_be_the_one_that_was_started(tmp_path, config):
    checkpoint = tmp_path / "run" / "checkpoint-10"
    with pytest.raises(InputError, match="no readable record"):
        record.compare_with_started(checkpoint, started(config))
    record.write(tmp_path / "run", started(config))
    free = {"resume": True, "logging_steps": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": False, "report_to": ()}
    record.compare_with_started(checkpoint, started(replace(config, **free)))
    before = started(config)
    later = ("optim", "adam_beta1", "warmup_steps", "f_divergence_type", "use_peft", "lora_target_modules")
    for name in later:  # options that came after that record was written
        del before["config"][name]
    record.write(tmp_path / "run", before)
    record.compare_with_started(checkpoint, started(config))
    with pytest.raises(InputError, match=r"expected adam_beta1 0.9; found adam_beta1 0.8"):
        record.compare_with_started(checkpoint, started(replace(config, adam_beta1=0.8)))
    with pytest.raises(InputError, match=r"expected use_peft False; found use_peft True"):
        record.compare_with_started(checkpoint, started(replace(config, use_peft=True)))
    with pytest.raises(InputError, match=r"expected beta 0.1; seed 42; found beta 0.2; seed 7"):
        record.compare_with_started(checkpoint, started(replace(config, beta=0.2, seed=7)))
    with pytest.raises(InputError, match=r"expected effective_batch_size 8; found effective_batch_size 16"):
        record.compare_with_started(checkpoint, started(config) | {"effective_batch_size": 16})
    with pytest.raises(InputError, match=r"expected weights_sha256 a1a1a1a1a1a1; found weights_sha256 999999999999"):
        record.compare_with_started(checkpoint, started(config, weights_sha256="99" * 32))
    (tmp_path / "run" / record.NAME).write_text(json.dumps({"config": {}, "store": {}}))
    with pytest.raises((InputError, StoreError)):
        record.compare_with_started(checkpoint, started(config))


def test_an_abandoned_build_is_named_and_one_at_work_is_waited_for(tmp_path, config, monkeypatch):
    """Without the first PyTorch waits for ever."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    refuse_abandoned_build()
    long_ago = time.time() - 60 * 60
    os.utime(lock.parent, (long_ago, long_ago))
    with pytest.raises(InputError, match=f"killed while it compiled.*60 minutes.*rm {lock}"):
        train(config)
    lock.unlink()
    refuse_abandoned_build()


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, config):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        record.write(tmp_path / "file" / "run", started(config))


def test_checks_before_launch_need_no_torch():
    """The command line asks them before it starts any rank."""
    code = "import sys, train.plan, train.hub; assert not {'torch', 'transformers', 'trl', 'datasets'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
