"""Which device is used, and that GPUs which are there and do not work are an error in both commands. PyTorch's answers are replaced by
those it gives on such a machine; what works is tested on GPUs in test_on_gpu.py."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from one_rank import one_rank
from train_setup import make_world

import cli
import devices
import launch
import precompute.desk.verify_model
import precompute.inputs
import precompute.worker
import store.verify
import train.run
from precompute.scorer import AttentionKernel
from precompute.scorer.attention import KERNELS, named_kernel, refuse_without_kernels, use_kernel
from store.errors import InputError
from store.reader import open_store

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(usable=, counted=, said=, cuda=, files=, visible=): a machine, as PyTorch and /dev show it."""

    def make(usable=0, counted=0, said=None, cuda="13.0", files=0, visible=None):
        def is_available():
            if said:
                warnings.warn(said, stacklevel=1)
            return usable > 0

        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable or counted)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for index in range(files):
            (tmp_path / f"nvidia{index}").touch()
        (tmp_path / "nvidiactl").touch()
        (tmp_path / "version").write_text(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
        )
        monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
        monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return make

    return make


def test_no_gpu_and_gpus_that_work(machine):
    machine()
    assert devices.num_gpus() == 0
    machine(usable=4)
    assert devices.num_gpus() == 4
    machine(cuda=None)  # a PyTorch for CPUs on a machine without GPUs
    assert devices.num_gpus() == 0


@pytest.mark.parametrize("seen", [{"counted": 4}, {"files": 4}, {"counted": 4, "files": 4}])
def test_a_driver_that_is_too_old(machine, seen):
    """NVML counts the GPUs, or their files are there; CUDA refuses them, with a warning."""
    machine(**seen, said=TOO_OLD)
    with pytest.raises(InputError) as error:
        devices.num_gpus()
    text = str(error.value)
    assert text.startswith("4 GPUs are here, but PyTorch cannot use them")
    for part in ("a driver for CUDA 13.0 or newer", "535.104.05", torch.__version__, "built for CUDA 13.0", "found version 12020"):
        assert part in text, part
    assert "uv pip install --reinstall torch --torch-backend=auto" in text and 'CUDA_VISIBLE_DEVICES=""' in text


def test_a_pytorch_for_cpus_beside_a_gpu(machine):
    machine(cuda=None, files=1)
    with pytest.raises(
        InputError, match="1 GPU is here, but PyTorch cannot use it; expected a PyTorch built for CUDA; found .* built for CPUs"
    ):
        devices.num_gpus()


def test_gpus_that_the_job_may_not_open_are_not_there(machine, monkeypatch):
    """In a control group without GPUs the files are there and cannot be opened."""
    machine(files=2)
    monkeypatch.setattr(devices, "_opens", lambda path: False)
    assert devices.num_gpus() == 0


@pytest.mark.parametrize("visible", ["", "-1", "-1,0", "NoDevFiles"])
def test_gpus_hidden_on_purpose(machine, visible):
    machine(counted=4, files=4, said=TOO_OLD, visible=visible)
    assert devices.num_gpus() == 0
    assert devices.device(0).type == "cpu"
    assert "CUDA_VISIBLE_DEVICES hides all GPUs" in devices.describe(devices.device(0), 1)


def test_a_gpu_that_does_not_exist_was_chosen(machine):
    machine(files=4, visible="7")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=7.*nvidia-smi"):
        devices.num_gpus()


@pytest.mark.parametrize(
    ("visible", "text"),
    [
        ("0,7,1", "names 3 GPUs, of which PyTorch can use 1; expected GPUs of this machine, each once. nvidia-smi"),
        ("0,x", "names 2 GPUs, of which PyTorch can use 1"),
        ("MIG-3c1d,MIG-77ab", "names 2 GPUs, .* can use 1; expected one part of a GPU .MIG. for a process.*--gpus-per-task=1"),
    ],
)
def test_fewer_gpus_than_were_named(machine, visible, text):
    """CUDA ends the list at the first entry that is no GPU, and shows a process one part of a GPU; neither says so."""
    machine(usable=1, counted=1, files=4, visible=visible)
    with pytest.raises(InputError, match=f"CUDA_VISIBLE_DEVICES={re.escape(visible)}: {text}"):
        devices.num_gpus()


@pytest.mark.parametrize("visible", ["0,1", " 2, 3", "0,1,", "0,1,-1,5", "GPU-8f6d,GPU-0b2e"])
def test_as_many_gpus_as_were_named(machine, visible):
    machine(usable=2, counted=2, files=4, visible=visible)
    assert devices.num_gpus() == 2


def test_a_gpu_was_named_and_there_is_none(machine):
    """As in a container that was not given the job's GPUs."""
    machine(visible="0,1")
    with pytest.raises(InputError, match='CUDA_VISIBLE_DEVICES=0,1: names a GPU, and there is none here.*--gpus all.*DEVICES=""'):
        devices.num_gpus()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("Error 802: system not yet initialized", "systemctl start nvidia-fabricmanager"),
        ("Error 803: system has unsupported display driver / cuda driver combination", "restart it"),
        ("Error 804: forward compatibility was attempted on non supported HW", "LD_LIBRARY_PATH"),
        ("CUDA unknown error", "nvidia-smi"),
    ],
)
def test_cuda_that_does_not_start_under_a_driver_that_is_new_enough(machine, monkeypatch, error, remedy):
    machine(counted=8, said=f"CUDA initialization: Unexpected error from cudaGetDeviceCount(). {error} (Triggered internally …)")
    monkeypatch.setattr(devices, "_cuda_of_driver", lambda: 13000)
    with pytest.raises(InputError, match=re.escape(error)) as raised:
        devices.num_gpus()
    assert remedy in str(raised.value) and "expected CUDA that starts" in str(raised.value)
    assert "newer" not in str(raised.value) and "Install" not in str(raised.value)
    monkeypatch.setattr(devices, "_cuda_of_driver", lambda: 12080)
    with pytest.raises(InputError, match="a driver for CUDA 13.0 or newer"):
        devices.num_gpus()


def test_a_pytorch_for_rocm_beside_nvidias(machine, monkeypatch):
    machine(cuda=None, files=1)
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    with pytest.raises(InputError, match="expected a PyTorch built for CUDA; found .* built for ROCm 7.1.0"):
        devices.num_gpus()


def test_gpus_of_several_kinds(machine, monkeypatch):
    machine(usable=3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100" if device == 1 else "NVIDIA H100")
    assert devices.describe(torch.device("cuda", 0), 3) == f"device: 2 x NVIDIA H100, 1 x NVIDIA A100 (torch {torch.__version__})"


@pytest.mark.parametrize("visible", ["0,1,2,3", "GPU-8f6d3a51-0b2e", "MIG-3c1d"])
def test_a_driver_that_is_too_old_in_a_job_of_slurm(machine, visible):
    """Slurm names the job's GPUs in every job; they are not what is wrong."""
    machine(counted=4, files=4, said=TOO_OLD, visible=visible)
    with pytest.raises(InputError, match=r"; expected a driver for CUDA 13.0 or newer; .*or a newer driver") as error:
        devices.num_gpus()
    assert "nvidia-smi" not in str(error.value)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """What to type, by command; the folder in which nothing may appear."""
    folder = tmp_path_factory.mktemp("world")
    world = make_world(folder, 4)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.rows))
    new = folder / "new"
    score = [
        "--dataset",
        folder / "rows.jsonl",
        "--model",
        world.model,
        "--max-length",
        96,
        "--dtype",
        "float32",
        "--ref-store",
        new,
    ]
    given = {
        "precompute": score,
        "train": ["--ref-store", world.store, "--output-dir", new],
        "verify": ["--ref-store", world.store, "--model", world.model],
        "import": [*score, "--cache", folder / "cache.arrow"],
    }
    sums = pa.table({f"ref_{side}_logps": [-1.0] * 4 for side in ("chosen", "rejected")})
    with pa.ipc.new_stream(str(folder / "cache.arrow"), sums.schema) as cache:
        cache.write_table(sums)
    return {name: [name, *map(str, words)] for name, words in given.items()}, new


def load_nothing(monkeypatch) -> None:
    for module in (precompute.inputs, train.run, precompute.desk.verify_model):
        monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr(store.verify, "verify", lambda *args: pytest.fail("every byte of the store was read"))


@pytest.mark.parametrize("by_a_launcher", [False, True])
@pytest.mark.parametrize("name", ["precompute", "train", "verify", "import"])
def test_commands_end_in_one_line_before_anything_is_loaded(machine, commands, name, by_a_launcher, monkeypatch):
    machine(counted=4, said=TOO_OLD)
    load_nothing(monkeypatch)
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items() if by_a_launcher else ():
        monkeypatch.setenv(variable, value)
    result = CliRunner().invoke(cli.main, commands[0][name])
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and "4 GPUs are here, but PyTorch cannot use them" in errors[0]
    assert not commands[1].exists()


@pytest.mark.parametrize("name", ["precompute", "train", "verify", "import"])
def test_a_kernel_that_cannot_run_here_is_refused_before_anything_is_loaded(commands, name, monkeypatch):
    load_nothing(monkeypatch)
    for layout, text in (
        ("packed", "--attention-kernel FA4: the kernel cannot run here; expected bfloat16 .*; found float32 on the CPU"),
        ("padded", "--attention-kernel FA4: belongs to the packed layout"),
    ):
        with one_rank():
            result = CliRunner().invoke(cli.main, [*commands[0][name], "--layout", layout, "--attention-kernel", "FA4"])
        assert result.exit_code == 2, result.output
        assert re.search(f"^Error: {text}", result.output, re.MULTILINE), result.output
        assert not commands[1].exists()


def test_a_store_records_the_kernel_that_made_it(commands, monkeypatch, tmp_path):
    """Only its activation is left out."""
    monkeypatch.setattr(precompute.worker, "use_kernel", lambda *args, **options: None)
    words = [word.replace(str(commands[1]), str(tmp_path / "store")) for word in commands[0]["precompute"]]
    result = CliRunner().invoke(cli.main, [*words, "--attention-kernel", "FA4"])
    assert result.exit_code == 0, result.output
    provenance = open_store(tmp_path / "store").manifest.provenance
    assert provenance["attention_kernel"] == "FA4"
    assert provenance["shards_by_attention_kernel"] == {"FA4": 1}  # others may go on with another


def test_a_gpu_that_does_not_compute(machine, monkeypatch):
    """Such as one for which this PyTorch has no kernels, or that another process holds."""

    def zeros(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might …")

    machine(usable=1)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(InputError, match="NVIDIA B200 cannot be used: CUDA error: no kernel image.*sm_80, sm_90.*found sm_100"):
        devices.device(0)


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError])
def test_a_gpu_that_does_not_answer(machine, monkeypatch, error):
    """NVML counts four and CUDA three: PyTorch cannot even name the last one, and has three ways to say so."""

    def refuse(*args, **kwargs):
        raise error("device >= 0 && device < num_gpus INTERNAL ASSERT FAILED")

    machine(usable=4)
    monkeypatch.setattr(torch, "zeros", refuse)
    for name in ("get_device_name", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    with pytest.raises(InputError, match="cuda:3: this GPU cannot be used: device >= 0.*export CUDA_VISIBLE_DEVICES=0,1,2. To run"):
        devices.device(3)


SRUN = {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}


@pytest.mark.parametrize(
    ("environment", "shared"),
    [
        ({**SRUN, "SLURM_GPUS_ON_NODE": "4"}, False),  # srun --ntasks-per-node=4 --gpus-per-task=1, as real daemons set it
        ({**SRUN, "SLURM_GPUS_ON_NODE": "1"}, True),  # srun --ntasks-per-node=4 --gpus=1: one for all
        (SRUN, False),
        ({}, False),  # a process to which somebody gave its own GPU
        ({**SRUN, "SLURM_GPUS_ON_NODE": "gpu:2"}, False),  # nothing that Slurm sets, and no reason to end in a traceback
        ({"TORCHELASTIC_RUN_ID": "1", **SRUN, "SLURM_GPUS_ON_NODE": "4"}, True),  # torchrun's ranks see the same
    ],
)
def test_the_only_visible_gpu(machine, monkeypatch, environment, shared):
    machine(usable=1)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device: zeros(*args))
    if shared:
        with pytest.raises(InputError, match="no GPU for local rank 3; expected at most 1 process on this machine"):
            devices.device(3)
    else:
        assert devices.device(3) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "4"}, 2),  # one node, its GPUs for all tasks
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "2"}, "--ntasks-per-node=8"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "2"}, "--ntasks-per-node=4"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "2", "RANK": "2"}, 2),  # by a launcher
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "1"}, 2),  # verify, say
    ],
)
def test_a_task_of_srun_with_more_gpus_than_it_uses(machine, monkeypatch, environment, expected):
    machine(usable=4)
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_STEP_ID": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device: zeros(*args))
    if isinstance(expected, int):
        assert devices.device(expected) == torch.device("cuda", expected)
    else:
        with pytest.raises(
            InputError, match=f"srun: each task has 4 GPUs and would use 1; expected one task for each GPU: {expected}"
        ):
            devices.device(0)


def test_one_gpu_for_all_tasks_of_the_second_node(machine, monkeypatch):
    machine(usable=1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {"STEP_TASKS_PER_NODE": "1(x2),4", "NODEID": "2", "GPUS_ON_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(InputError, match="no GPU for local rank 3"):
        devices.device(3)


def test_a_step_of_one_task_starts_its_own_processes(monkeypatch):
    """srun --ntasks=1 --gpus=4: one for each GPU, as without Slurm; without a GPU it is one process, as without srun it is not."""
    monkeypatch.setattr(launch, "num_gpus", lambda: 0)
    assert launch.num_local_processes(None, 2) == 2
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"STEP_ID": "0", "PROCID": "0", "NTASKS": "1", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launch.launched() is None
    assert launch.num_local_processes(None, 2) == 1
    monkeypatch.setattr(launch, "num_gpus", lambda: 4)
    assert launch.num_local_processes(None, 2) == 4
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert launch.launched() == launch.Process(0, 2, 0)


def test_an_error_of_one_worker_is_shown_while_the_others_go_on(tmp_path):
    """Of one bad GPU among four, at once: the others may take hours. And again at the end, below all that they said."""
    (tmp_path / "worker.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "if os.environ['RANK'] == '1':\n    sys.exit('Error: cuda:1 is broken.')\n"
        "end = time.time() + 600\n"
        "while not Path(sys.argv[1]).exists() and time.time() < end:\n    time.sleep(0.05)\n"
        "print('done', file=sys.stderr)\n"
    )
    code = "import launch, sys; sys.argv = sys.argv[1:]; sys.exit(launch.run_workers(2))"
    command = [sys.executable, "-c", code, tmp_path / "worker.py", tmp_path / "seen"]
    with subprocess.Popen(command, cwd=Path(launch.__file__).parent, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr.readline() == "Error: cuda:1 is broken.\n"
        (tmp_path / "seen").touch()
        assert started.stderr.read() == "done\nError: cuda:1 is broken.\n"
    assert started.returncode == 1


def test_a_pytorch_without_windows_in_varlen_attention(monkeypatch):
    from torch.nn.attention import varlen

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    refuse_without_kernels(gpu, "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match="compute capability 8.0 or newer; found NVIDIA T4"):
        refuse_without_kernels(gpu, "bfloat16")
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None
    )  # 2.10's
    with pytest.raises(InputError, match=f"expected torch 2.11 or newer.*found torch {re.escape(torch.__version__)}"):
        refuse_without_kernels(gpu, "bfloat16")
    monkeypatch.delattr(varlen, "varlen_attn")  # as older ones
    with pytest.raises(InputError, match="--layout padded"):
        refuse_without_kernels(gpu, "float16")
    refuse_without_kernels(gpu, "float32")
    refuse_without_kernels(torch.device("cpu"), "bfloat16")


def test_the_driver_is_described_from_what_there_is(machine, monkeypatch):
    machine()
    assert devices.driver().endswith("(535.104.05)")
    monkeypatch.setattr(devices, "DRIVER", Path("nowhere"))
    assert devices.driver()


def test_kernels_by_name(monkeypatch):
    """Activated through PyTorch where device, dtype, layout and package fit; each that does not is named."""
    activated, gpu = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    assert tuple(KERNELS) == get_args(AttentionKernel)
    use_kernel("default", layout="packed", device=gpu, dtype="bfloat16")
    use_kernel("default", layout="padded", device=torch.device("cpu"), dtype="float32")
    assert activated == []
    use_kernel("FA4", layout="packed", device=gpu, dtype="bfloat16")
    assert activated == ["FA4"]
    for kernel, layout, device, dtype, text in (
        (
            "FA3",
            "packed",
            gpu,
            "bfloat16",
            "expected bfloat16 or float16 on a GPU of compute capability 9.0; found bfloat16 on NVIDIA B200",
        ),
        ("FA4", "packed", gpu, "float32", "found float32 on NVIDIA B200"),
        ("FA4", "packed", torch.device("cpu"), "bfloat16", "found bfloat16 on the CPU"),
        ("FA4", "padded", gpu, "bfloat16", "--attention-kernel FA4: belongs to the packed layout"),
    ):
        with pytest.raises(InputError, match=text):
            use_kernel(kernel, layout=layout, device=device, dtype=dtype)
    assert activated == ["FA4"]


def test_a_kernel_whose_package_is_absent_or_that_does_not_run_the_model(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(
        InputError, match="--attention-kernel FA4: the kernel cannot be activated: ModuleNotFoundError.*flash-attn-4"
    ):
        use_kernel("FA4", layout="packed", device=gpu, dtype="bfloat16")
    with (
        pytest.raises(InputError, match="FA4: the kernel does not run this model: FA4 flash_attention forward unsupported"),
        named_kernel("FA4"),
    ):
        raise RuntimeError("FA4 flash_attention forward unsupported: head")
    with (
        pytest.raises(InputError, match="FA4: the kernel does not run this model: AssertionError: unsupported head_dim"),
        named_kernel("FA4"),
    ):
        raise AssertionError("unsupported head_dim")  # FlashAttention 4 is written in Python
    with pytest.raises(InputError, match="^as it was"), named_kernel("FA4"):
        raise InputError("as it was")
    with pytest.raises(RuntimeError, match="as it was"), named_kernel("default"):
        raise RuntimeError("as it was")
