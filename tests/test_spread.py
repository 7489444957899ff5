"""--gpus-per-worker without any GPU: which part lies where, which GPUs are whose, and what is refused. On GPUs: on_gpu/spread.py."""

import re

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, Olmo3Config

import cli
import devices
import launch
from precompute.scorer import model as loading
from precompute.scorer.budget import enough_memory
from precompute.scorer.spread import largest_share, more_room, runs
from store.errors import InputError

GIB = 2**30


@pytest.mark.parametrize(
    ("sizes", "num", "expected"),
    [
        ([1, 1, 1, 9], 2, [3, 1]),
        ([9, 1, 1, 1], 2, [1, 3]),
        ([2, 2, 2, 2], 3, [2, 1, 1]),  # none is left without a part
        ([5, 3, 3, 3, 3, 5], 2, [3, 3]),
        ([5, 3, 3, 3, 3, 5], 4, [1, 2, 2, 1]),
        ([1, 1], 4, [1, 1]),
        ([4], 1, [1]),
    ],
)
def test_runs_by_hand(sizes, num, expected):
    found = runs(sizes, num)
    assert [len(each) for each in found] == expected
    assert [index for each in found for index in each] == list(range(len(sizes)))


def test_olmo_3_32b_by_hand():
    """Embeddings and head of 100,278 x 5,120, and 64 layers, in bfloat16: over two GPUs half of each, over three at most 22 layers."""
    config = Olmo3Config(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=100278,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    end = 2 * 100278 * 5120
    attention = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 5120 + 1024  # with the norms of queries and keys
    layer = 2 * (attention + 3 * 5120 * 27648 + 2 * 5120)
    assert largest_share(model, 1) == 64 * layer + 2 * end + 2 * 5120
    assert largest_share(model, 2) == 32 * layer + end + 2 * 5120
    assert largest_share(model, 3) == max(21 * layer + end + 2 * 5120, 22 * layer)


def test_a_head_that_is_the_embeddings_counts_once():
    model = tiny.make_model("llama")
    total = sum(each.numel() * each.element_size() for each in model.parameters())
    assert largest_share(model, 1) == total


def see(monkeypatch, num_gpus: int, **environment: str) -> None:
    monkeypatch.setattr(devices, "num_gpus", lambda: num_gpus)
    monkeypatch.setattr(launch, "num_gpus", lambda: num_gpus)
    monkeypatch.setattr(devices, "_refuse_unusable", lambda where: None)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("gpus", "rank", "number", "environment", "expected"),
    [
        (4, 1, 2, {}, [2, 3]),
        (8, 1, 4, {"TORCHELASTIC_RUN_ID": "1"}, [4, 5, 6, 7]),
        (2, 3, 2, {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}, [0, 1]),  # srun --gpus-per-task=2
        (4, 1, 2, {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "4"}, [2, 3]),  # srun --ntasks-per-node=2 of four
    ],
)
def test_gpus_of_a_worker(monkeypatch, gpus, rank, number, environment, expected):
    see(monkeypatch, gpus, **environment)
    assert [each.index for each in devices.devices(rank, number)] == expected


@pytest.mark.parametrize(
    ("gpus", "rank", "environment"),
    [
        (4, 2, {}),
        (3, 1, {}),
        (2, 1, {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"}),  # both tasks see both
    ],
)
def test_no_two_workers_get_the_same_gpu(monkeypatch, gpus, rank, environment):
    see(monkeypatch, gpus, **environment)
    most = f"at most {gpus // 2} process{'es' if gpus == 4 else ''} on this machine; found {gpus} GPUs"
    with pytest.raises(InputError, match=f"--gpus-per-worker 2: no 2 GPUs for local rank {rank}; expected {most}"):
        devices.devices(rank, 2)


def test_workers_are_gpus_divided(monkeypatch):
    see(monkeypatch, 8)
    workers = lambda requested, each: launch.num_local_processes(requested, 1, gpus_per_process=each)
    assert [workers(None, each) for each in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert workers(2, 3) == 2  # six of eight, as was asked for
    with pytest.raises(
        InputError, match="--gpus-per-worker 3: some GPUs would do nothing; expected a divisor of 8.*--num-workers 2"
    ):
        workers(None, 3)
    with pytest.raises(InputError, match="--gpus-per-worker 9: more GPUs than there are; expected a divisor of 8"):
        workers(None, 9)
    with pytest.raises(InputError, match="expected 1 to 4; found 5"):
        workers(5, 2)
    see(monkeypatch, 0)
    assert workers(None, 2) == 1  # which finds no GPU, and says so


def test_refused_before_anything_is_loaded(monkeypatch, tiny_llama, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    words = ["precompute", "--dataset", tmp_path / "rows.jsonl", "--model", tiny_llama, "--max-length", 64, "--dtype", "float32"]
    words += ["--ref-store", tmp_path / "store", "--gpus-per-worker", 2]
    monkeypatch.setattr("precompute.inputs.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    for more, text in (
        ([], "--gpus-per-worker 2: there are no GPUs. Leave it out on the CPU"),
        (["--torch-compile"], "--torch-compile, --gpus-per-worker 2: compiled layers were never run on several GPUs"),
    ):
        result = CliRunner().invoke(cli.main, [str(each) for each in (*words, *more)])
        assert result.exit_code == 2 and re.search(f"^Error: {text}", result.output, re.MULTILINE), result.output
        assert not (tmp_path / "store").exists()


def test_weights_that_do_not_fit_are_refused_by_number(monkeypatch, tiny_olmo3):
    """590 kB of layers, 98 kB each of embeddings and head, in float32."""
    gpus = tuple(torch.device("cuda", index) for index in range(4))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def ask(free: int, number: int = 1, dtype: str = "float32") -> None:
        monkeypatch.setattr(loading, "free_memory", lambda device: free / loading.SHARE["cuda"])
        loading.refuse_too_large(str(tiny_olmo3), revision=None, dtype=dtype, devices=gpus[:number])

    total = largest_share(tiny.make_model("olmo3"), 1)
    ask(total)
    ask(total // 2 + 1, dtype="bfloat16")
    with pytest.raises(
        InputError,
        match=r"do not fit on one GPU; expected 0.000\d+ GiB, for 197,\d+ parameters in float32;.*: --gpus-per-worker 2$",
    ):
        ask(total - 1)
    ask(total - 1, number=2)
    with pytest.raises(InputError, match="--gpus-per-worker 4$"):  # three would be enough, and do not divide four
        ask(300_000)
    with pytest.raises(InputError, match="do not fit on each of 2 GPUs.*It needs larger GPUs, or more than the 4 that are here"):
        ask(1000, number=2)
    loading.refuse_too_large(str(tiny_olmo3), revision=None, dtype="float32", devices=(torch.device("cpu"),))


@pytest.mark.parametrize(
    ("there", "number", "advice"),
    [
        (8, 1, "spread the model: --gpus-per-worker 2"),
        (8, 4, "spread the model: --gpus-per-worker 8"),
        (3, 1, "spread the model: --gpus-per-worker 3"),  # two would leave one idle
        (1, 1, "take GPUs that have more."),
        (4, 4, "take GPUs that have more."),
    ],
)
def test_memory_that_runs_out_names_gpus_that_are_there(monkeypatch, there, number, advice):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert more_room(number) == advice
    with (
        pytest.raises(InputError, match=f"out of memory here; found CUDA out of memory. {advice}"),
        enough_memory("here", lambda: advice),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
