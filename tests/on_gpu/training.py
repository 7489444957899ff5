"""Phase 2 on a GPU, as one task of `srun --gpus-per-task=1` that is not the first of its machine: what a micro-step costs, and that a
tensor left on the CPU fails. Phase 1 as such a task too."""

import atexit
import gc
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import pytest
import torch
from one_rank import one_rank
from safetensors.torch import load_file
from train_setup import MAX_LENGTH, make_world, run_config
from transformers import TrainingArguments

from launch import Process, launched
from precompute.config import PrecomputeConfig
from precompute.start import start
from store.errors import InputError
from store.reader import open_store
from train import capacity, memory
from train.config import TrainConfig
from train.ranks import join
from train.run import train
from train.trainer import REFERENCE, StoreDPOTrainer

made_up = sys.modules.get("made_up_gpu.load")
atexit.register(gc.unfreeze)  # libraries count what is left at the end


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("training")
    world = make_world(folder, 16, "olmo3", "bfloat16")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.rows))
    return run_config(
        folder,
        loss_type=("sigmoid_norm",),
        beta=5.0,
        learning_rate=1e-4,
        effective_batch_size=None,
        gradient_accumulation_steps=2,
        gradient_checkpointing=None,
        max_steps=2,
        save_strategy="no",
    )


@pytest.fixture(autouse=True)
def a_task_of_srun(monkeypatch):
    gc.collect()
    gc.freeze()  # what was imported: DeepSpeed and measuring memory look for garbage again and again, half a second each time
    for name, value in {"STEP_ID": "0", "PROCID": "0", "NTASKS": "1", "LOCALID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with one_rank():
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
        assert launched().local_rank == 3
        yield


def test_phase_1_uses_the_only_gpu_it_sees(config, capsys):
    """Number 0 to it, though this is task 3."""
    folder = config.ref_store.parent
    given = {
        "dataset": (str(folder / "rows.jsonl"),),
        "model": str(folder / "model"),
        "tokenizer": str(folder / "model"),
        "limit": 8,
    }
    rest = {"split": "train", "max_length": MAX_LENGTH, "dtype": "bfloat16", "shard_size": 4, "ref_store": folder / "by-srun"}
    with pytest.raises(SystemExit) as ended:
        start(PrecomputeConfig(**given, **rest), None)
    assert ended.value.code == 0
    assert re.search("^device: NVIDIA", capsys.readouterr().err, re.MULTILINE)
    assert (folder / "by-srun" / "part-00001.parquet").exists()
    assert "NVIDIA" in str(open_store(folder / "by-srun").manifest.provenance)


@pytest.mark.skipif(made_up is None, reason="a real GPU does not count")
def test_what_a_micro_step_costs(config, monkeypatch, capsys):
    """Launches, waits of the host and copies to the device, of the third micro-step; more of them is a slower GPU."""
    counted, step = [], StoreDPOTrainer.training_step

    def counting(self, *args, **kwargs):
        made_up.clear_counts()
        loss = step(self, *args, **kwargs)
        counted.append(made_up.counts())
        assert loss.device == torch.device("cuda:0")
        return loss

    monkeypatch.setattr(StoreDPOTrainer, "training_step", counting)
    result = train(config)
    assert result.first_loss == pytest.approx(0.6931, abs=1e-2)
    assert capsys.readouterr().out.startswith(f"device: {torch.cuda.get_device_name()}")
    third = counted[2]
    print({name: number for name, number in third.items() if "::" not in name})  # shown when it fails
    assert third["launches"] <= 930  # two for each of 48 parameters bring its gradient to float32 and add it up there
    assert third["waits"] <= 26
    assert third["to device"] <= 9


@pytest.mark.skipif(made_up is None, reason="a real GPU does not count")
def test_by_tokens_the_host_waits_for_nothing_in_a_micro_step(config, monkeypatch):
    """Two micro-steps to an optimizer step, four pairs each on average. DeepSpeed waits once at the end of each backward, for its reduction;
    with the step it reads four numbers, and the clock waits once."""
    counted, step = [], StoreDPOTrainer.training_step

    def counting(self, *args, **kwargs):
        made_up.clear_counts()
        loss = step(self, *args, **kwargs)
        counted.append(made_up.counts())
        return loss

    monkeypatch.setattr(StoreDPOTrainer, "training_step", counting)
    by_tokens = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None}
    by_tokens |= {"tokens_per_batch": 400, "effective_batch_size": 8, "output_dir": Path(f"{config.output_dir}-tokens")}
    result = train(TrainConfig(**{**vars(config), **by_tokens}))
    assert result.first_loss == pytest.approx(0.6931, abs=1e-2)
    assert len(counted) == 4
    within, with_step = counted[2:]
    print({name: number for name, number in within.items() if "::" not in name})  # shown when it fails
    assert within["waits"] <= 1 and with_step["waits"] <= 6
    assert "aten::_local_scalar_dense" not in within and "aten::nonzero" not in within and "to host" not in within
    assert within["to device"] <= 14
    assert within["launches"] <= 880


def test_references_left_on_the_cpu_are_refused(config, monkeypatch):
    """The control: were devices not checked, the tests above would show nothing. TRL's own pass once failed with these words."""
    prepare = StoreDPOTrainer._prepare_inputs

    def left_behind(self, inputs):
        return {**prepare(self, inputs), **{name: inputs[name].cpu() for name in REFERENCE}}

    monkeypatch.setattr(StoreDPOTrainer, "_prepare_inputs", left_behind)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        train(TrainConfig(**{**vars(config), "output_dir": Path(f"{config.output_dir}-left")}))


@pytest.fixture
def by_tokens(config, tmp_path, monkeypatch) -> TrainConfig:
    """As many pairs as fit, under small buffers of DeepSpeed's and after short probes, which cost a made-up GPU seconds."""
    monkeypatch.setattr(memory, "PROBES", {"cuda": (128, 512)})
    monkeypatch.setattr(memory, "LAYER", 256)
    zero = json.loads(config.zero_config.read_text())
    zero["zero_optimization"] |= {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    pairs = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, "effective_batch_size": 8}
    return replace(config, **pairs, tokens_per_batch="auto", zero_config=tmp_path / "zero.json", output_dir=tmp_path / "run")


def test_auto_plans_the_memory(by_tokens, capsys):
    """Held against what the run then took, of weights, engine and micro-steps."""
    result = train(by_tokens)
    said = capsys.readouterr().out
    assert re.search(
        r"^--tokens-per-batch auto: [\d,]+ without gradient checkpointing: .* per token, .* GiB for the engine", said, re.MULTILINE
    )
    planned = json.loads((by_tokens.output_dir / "run.json").read_text())["memory"]
    assert planned["gradient_checkpointing"] is False and planned["tokens_per_batch"] % 1024 == 0
    measured = planned["measured"]
    assert measured["checkpointed"]["per_unit"] < measured["kept"]["per_unit"]
    row = measured["kept"]["constant"] + measured["kept"]["per_unit"] * 8 * 2 * 96  # all pairs of a step, at their longest
    weights = 2 * sum(each.numel() for each in load_file(by_tokens.output_dir / "model.safetensors").values())
    libraries = 0 if made_up else 256 * 2**20  # their workspaces on a real GPU, more than such a model takes
    assert 0.3 < result.peak_memory / (weights + max(measured["backward"] + row, measured["step"]) + libraries) < 1.1 or (
        libraries and result.peak_memory < libraries
    )


@pytest.mark.skipif(made_up is None, reason="what a real GPU's libraries and its allocator keep is more than this model takes")
def test_memory_that_does_not_suffice_for_a_number_suffices_for_auto(by_tokens):
    taken = torch.empty(torch.cuda.mem_get_info()[0] - 44 * 2**20, dtype=torch.uint8, device="cuda:0")
    given = replace(by_tokens, tokens_per_batch=100_000, gradient_checkpointing=False)
    with pytest.raises(InputError, match="out of memory in step [12].*found CUDA out of memory.*Use --gradient-checkpointing"):
        train(given)
    train(by_tokens)
    planned = json.loads((by_tokens.output_dir / "run.json").read_text())["memory"]
    assert planned["tokens_per_batch"] < 1024
    del taken


@pytest.mark.skipif(made_up is None, reason="of Gloo, which stands in for NCCL")
def test_memory_of_a_collective_that_has_ended_is_free():
    """Gloo's thread, and here a reference, outlive it; measurements were off by a buffer of DeepSpeed's, in one process of ten."""
    join(Process(0, 1, 0))
    deepspeed.init_distributed("nccl", verbose=False)
    before = torch.cuda.memory_allocated()
    buffer = torch.ones(1000, device="cuda")
    work = torch.distributed.all_reduce(buffer, async_op=True)
    assert torch.cuda.memory_allocated() == before + 4000
    del buffer
    work.wait()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(made_up is None, reason="the counts are those of a made-up GPU, which rounds nothing up")
@pytest.mark.parametrize(("stage", "dtype"), [(2, "bfloat16"), (2, "float32"), (1, "bfloat16")])
def test_what_is_counted_is_what_deepspeed_takes_or_little_less(by_tokens, stage, dtype):
    """One refuses by it: it must never be more. Of a small model under a real engine, in its second step."""
    join(Process(0, 1, 0))
    zero = json.loads(by_tokens.zero_config.read_text())
    zero["zero_optimization"]["stage"] = stage
    by_tokens.zero_config.write_text(json.dumps(zero))
    counted = capacity.PerParameter.under(zero, dtype)
    of = getattr(torch, dtype)
    args = TrainingArguments(str(by_tokens.output_dir), bf16=dtype == "bfloat16", deepspeed=str(by_tokens.zero_config))
    taken = max(each.per_unit for each in memory._of_engines(by_tokens.zero_config, args, of, torch.device("cuda", 0), 1))
    assert 0.65 * taken < counted.on_each_of(1) - counted.weights <= taken


def test_a_policy_that_does_not_fit_is_refused_before_it_is_loaded(by_tokens, monkeypatch):
    """197,568 parameters of 18 bytes: 3.4 MiB."""
    monkeypatch.setattr("train.run.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    monkeypatch.setattr(capacity, "free_memory", lambda device: 3 * 2**20)
    text = (
        r"ZeRO stage 2; expected 0.0033\d GiB on each GPU.*/ 1\) bytes; found 0.00293 GiB free. Train on 2 GPUs or more.*--use-peft"
    )
    with pytest.raises(InputError, match=text):
        train(by_tokens)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        train(replace(by_tokens, use_peft=True, lora_target_modules=("all-linear",)))
