"""The CPU's kernels against the same formulas in float64, in every width of register that they can be compiled for."""

import copy
import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

import cli
from precompute.scorer import kernels
from precompute.scorer.cpu_head import head_values
from precompute.scorer.head import Head
from precompute.scorer.kernels import Paths, fold_logits, log_sum_exp, logits_gradient_, packed_attention, rms_norm
from precompute.scorer.packing import Branch, Sequence, pack
from store.errors import InputError

COMPILED = {
    "for this machine": (),
    "16 lanes": ("-DLANES=16", "-DROWS=12"),  # as with AVX-512, whatever the machine has
    "4 lanes": ("-DLANES=4", "-DROWS=6"),
    "no AVX": ("-mno-avx",),
}


@pytest.fixture(params=COMPILED)
def compiled(request, monkeypatch):
    flags = COMPILED[request.param]
    if "-mno-avx" in flags and platform.machine() != "x86_64":
        pytest.skip("x86 only")
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, *flags))
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


def tree(seed: int, longest: int) -> tuple[Branch, ...]:
    """Branches of real packing: prompts shared by two and more, responses that begin alike, one token and `longest`."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(3):
        prompt = rng.integers(0, 99, rng.integers(10, longest))
        for _ in range(2):
            ids = np.concatenate([prompt, rng.integers(0, 99, rng.integers(1, longest))])
            sequences += [Sequence(ids.astype(np.int32), len(prompt))]
            forked = np.concatenate([ids[: len(prompt) + 9], rng.integers(0, 99, rng.integers(1, 20))])
            sequences += [Sequence(forked.astype(np.int32), len(prompt))]
    (batch,) = pack(sequences, 100_000)
    assert any(len(branch.context) > 1 for branch in batch.branches)
    return batch.branches


def inputs(branches, heads: int, kv_heads: int, depth: int, seed: int = 0) -> list[torch.Tensor]:
    """query [1, H, T, D], key and value [1, Hkv, T, D], each a view of [1, T, heads, D] as a model has it."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, branches[-1].stop, number, depth, generator=generator).transpose(1, 2)
        for number in (heads, kv_heads, kv_heads)
    ]


def exact(query, key, value, branches, scaling: float, window: int | None) -> torch.Tensor:
    """Softmax over what each token sees, in float64, branch by branch with a mask: [1, T, H, D]."""
    query, key, value = (tensor[0].double() for tensor in (query, key, value))
    group = len(query) // len(key)
    results = []
    for branch in branches:
        own = torch.arange(branch.start, branch.stop)
        path = torch.cat([*(torch.arange(*stretch) for stretch in branch.context), own])
        places = torch.arange(len(path))
        distance = places[-len(own) :, None] - places
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        scores = query[:, own] @ key[:, path].repeat_interleave(group, 0).transpose(1, 2) * scaling
        results.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, path].repeat_interleave(group, 0))
    return torch.cat(results, dim=1).transpose(0, 1)[None]


@pytest.mark.parametrize("window", [None, 1, 17, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "depth"), [(9, 3, 64), (4, 4, 128), (8, 1, 20), (2, 2, 80), (3, 3, 1)])
def test_attention(heads, kv_heads, depth, window, compiled):
    """Branches of one token to 700, which is more than one block of keys, of queries and of a register's width."""
    branches = tree(seed=depth, longest=700 if depth == 64 else 90)
    query, key, value = inputs(branches, heads, kv_heads, depth)
    query = query * 3  # scores that differ, so that the largest one moves from block to block
    with torch.inference_mode():
        out = packed_attention(query, key, value, Paths(branches), scaling=0.2, window=window)
    torch.testing.assert_close(out.double(), exact(query, key, value, branches, 0.2, window), atol=2e-5, rtol=0)


def test_attention_scales_by_the_heads_width_unless_told(compiled):
    branches = tree(seed=0, longest=30)
    query, key, value = inputs(branches, 2, 1, 16)
    out = packed_attention(query, key, value, Paths(branches), scaling=None, window=None)
    torch.testing.assert_close(out.double(), exact(query, key, value, branches, 0.25, None), atol=1e-5, rtol=0)


def test_attention_with_scores_far_apart(compiled):
    """Scores of thousands: the softmax is one key's, and nothing overflows."""
    branches = tree(seed=2, longest=300)
    query, key, value = inputs(branches, 2, 2, 64)
    out = packed_attention(query * 1000, key, value, Paths(branches), scaling=None, window=None)
    torch.testing.assert_close(out.double(), exact(query * 1000, key, value, branches, 0.125, None), atol=1e-3, rtol=0)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_hands_on_what_is_not_a_number(which, compiled):
    """To all who see it. A value reaches more, for nothing times it is no number either, but no other path."""
    branches = (Branch(0, 50, ()), Branch(50, 60, ((0, 20),)), Branch(60, 80, ((0, 50),)), Branch(80, 130, ()))
    tensors = inputs(branches, 2, 1, 16)
    tensors[which][0, :, 30] = torch.nan
    out = packed_attention(*tensors, Paths(branches), scaling=None, window=None)
    spoiled = set(out.isnan().flatten(2).any(-1)[0].nonzero()[:, 0].tolist())
    seeing = {30} if which == 0 else {*range(30, 50), *range(60, 80)}
    assert spoiled == seeing if which < 2 else seeing <= spoiled <= set(range(80))


def test_attention_has_the_same_bits_with_any_number_of_threads_and_neighbours(monkeypatch):
    branches = tree(seed=4, longest=400)
    tensors = inputs(branches, 6, 3, 64)
    outs = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        outs.append(packed_attention(*tensors, Paths(branches), scaling=None, window=100))
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    assert not branches[0].context
    alone = [tensor[:, :, : branches[0].stop] for tensor in tensors]
    assert torch.equal(packed_attention(*alone, Paths(branches[:1]), scaling=None, window=100), outs[0][:, : branches[0].stop])


def test_attention_takes_tensors_of_any_strides():
    branches = tree(seed=5, longest=40)
    tensors = inputs(branches, 4, 2, 16)
    expected = packed_attention(*tensors, Paths(branches), scaling=None, window=None)
    for others in ([each.contiguous() for each in tensors], [each.mT.contiguous().mT for each in tensors]):
        assert torch.equal(packed_attention(*others, Paths(branches), scaling=None, window=None), expected)


@pytest.mark.parametrize("window", [None, 1, 17, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "depth"), [(9, 3, 64), (8, 1, 20), (2, 2, 80), (3, 3, 1)])
def test_attention_gradient(heads, kv_heads, depth, window, compiled):
    """Against the definition's, in float64; the result is the one without gradients, to the bit."""
    branches = tree(seed=depth, longest=500 if depth == 64 else 90)
    query, key, value = inputs(branches, heads, kv_heads, depth)
    tensors = [query * 3, key, value]
    grad = torch.randn(branches[-1].stop, heads, depth, 1, generator=torch.Generator().manual_seed(9)).permute(3, 0, 1, 2)

    def gradients(attention, tensors):
        leaves = [each.clone().requires_grad_(True) for each in tensors]
        out = attention(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))

    def kernel(q, k, v):
        return packed_attention(q, k, v, Paths(branches), scaling=0.2, window=window)

    def definition(q, k, v):
        return exact(q, k, v, branches, 0.2, window)

    out, found = gradients(kernel, tensors)
    assert torch.equal(out, kernel(*tensors))
    _, expected = gradients(definition, [each.double() for each in tensors])
    largest = max(each.abs().max().item() for each in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-6 * largest, rtol=0)


def test_attention_gradient_has_the_same_bits_with_any_number_of_threads(monkeypatch):
    branches = tree(seed=4, longest=400)
    tensors = [each.requires_grad_(True) for each in inputs(branches, 6, 3, 64)]
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        out = packed_attention(*tensors, Paths(branches), scaling=None, window=100)
        found.append(torch.autograd.grad(out.square().sum(), tensors))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("width", [1, 7, 64, 576, 1001])
def test_rms_norm(width, compiled):
    x = torch.randn(3, 50, width) * torch.logspace(-4, 3, 50)[:, None]  # epsilon counts in the first, not in the last
    weight = torch.randn(width)
    expected = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, atol=1e-6, rtol=1e-5)
    x[1, 2, width // 2] = torch.nan
    assert rms_norm(x, weight, 1e-5).isnan().flatten(0, 1).all(-1).nonzero().tolist() == [[52]]


def rms_norm_gradients(norm, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, weight = x.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    return torch.autograd.grad(norm(x, weight), (x, weight), grad)


@pytest.mark.parametrize("width", [1, 7, 64, 1001])
def test_rms_norm_gradient(width, compiled, monkeypatch):
    """Against the definition's, in float64; rows more than are added up at a time, some as small as epsilon; the same bits for any number of threads."""
    x = torch.randn(3, 50, width) * torch.logspace(-4, 3, 50)[:, None]
    weight, grad = torch.randn(width), torch.randn(width, 50, 3).permute(2, 1, 0)  # a gradient of any strides
    found = rms_norm_gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight, grad)

    def definition(x, w):
        return w * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    expected = rms_norm_gradients(definition, *(each.double() for each in (x, weight, grad)))
    # Of a row, to the rounding of its largest entry: what is subtracted may be as large as what is left.
    size = (grad * weight).abs().amax(-1, keepdim=True).double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert ((found[0].double() - expected[0]).abs() <= 1e-6 * size * (1 + width**0.5)).all()
    torch.testing.assert_close(found[1].double(), expected[1], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    again = rms_norm_gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight, grad)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("width", [1, 7, 64, 1001])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_log_sum_exp(width, scale, compiled):
    x = torch.randn(70, width + 5)[:, 3:-2] * scale  # a view, as a tile of the vocabulary is
    x[0], x[1, 0] = 12345.0, -torch.inf
    torch.testing.assert_close(log_sum_exp(x).double(), x.double().logsumexp(1), atol=2e-6, rtol=2e-7)
    x[2, width // 2] = torch.nan
    assert log_sum_exp(x).isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("after", [Head(), Head(0.5), Head(2.0, 3.0)], ids=["plain", "factor", "soft cap"])
@pytest.mark.parametrize("bias", [True, False])
def test_head_with_gradients(after, bias, compiled, monkeypatch):
    """Against the whole softmax in float64; several tiles of both kinds, the last ones narrow, and targets that are the largest."""
    monkeypatch.setattr("precompute.scorer.cpu_head.TILE", (64, 40))
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 203, bias=bias), 3 * torch.randn(150, 16)
    with torch.no_grad():
        targets = torch.cat([head(hidden[:50]).argmax(dim=1), torch.randint(0, 203, (99,)), torch.tensor([202])])
    grad, grad_entropy = torch.randn(2, 150).double()

    def gradients(values, hidden, head):
        hidden = hidden.clone().requires_grad_(True)
        found = values(hidden, head)
        loss = (found[0] * grad.to(found[0].dtype)).sum() + (found[1] * grad_entropy.to(found[0].dtype)).sum()
        return [each.detach() for each in found], torch.autograd.grad(loss, [hidden, *head.parameters()])

    def definition(hidden, head):
        logits = after.scale * head(hidden)
        if after.softcap is not None:
            logits = after.softcap * torch.tanh(logits / after.softcap)
        logps = logits.log_softmax(dim=1)
        entropy = -(logps.exp() * logps).sum(dim=1)
        squares = (2 * logps).logsumexp(dim=1)
        return logps.gather(1, targets[:, None])[:, 0], entropy, squares, logits.mean(dim=1), logits.argmax(dim=1) == targets

    found, found_gradients = gradients(lambda *given: head_values(*given, after, targets), hidden, head)
    expected, expected_gradients = gradients(definition, hidden.double(), copy.deepcopy(head).double())
    assert torch.equal(found[4], expected[4])
    assert 50 <= found[4].sum() < 150
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=2e-5)


def test_the_first_of_equal_logits_is_the_largest():
    """As argmax has it, across tiles too."""
    head = torch.nn.Linear(1, 3000, bias=False)
    torch.nn.init.ones_(head.weight)
    targets = torch.tensor([0, 1, 2500])
    assert head_values(torch.ones(3, 1), head, Head(), targets)[4].tolist() == [True, False, False]


def test_what_the_kernels_do_not_take_is_refused():
    branches = (Branch(0, 4, ()),)
    query, key, value = inputs(branches, 2, 1, 8)
    for wrong in ((query.double(), key, value), (query, key.bfloat16(), value)):
        with pytest.raises(ValueError, match="not float32"):
            packed_attention(*wrong, Paths(branches), scaling=None, window=None)
    with pytest.raises(ValueError, match="query"):
        packed_attention(query, key, value[:, :, :3], Paths(branches), scaling=None, window=None)
    with pytest.raises(ValueError, match="over 3 tokens for a row of 4"):
        packed_attention(query, key, value, Paths((Branch(0, 3, ()),)), scaling=None, window=None)
    ids, row = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    for kernel in (
        lambda x: rms_norm(x, torch.ones(3), 1e-6),
        log_sum_exp,
        lambda x: fold_logits(x, ids),
        lambda x: logits_gradient_(x, ids, row, row, row, row),
    ):
        with pytest.raises(ValueError, match="not float32"):
            kernel(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="not int64"):
        fold_logits(torch.ones(2, 3), ids.int())
    with pytest.raises(ValueError, match="a row's numbers lie 2 apart"):
        fold_logits(torch.ones(3, 2).t(), ids)


# --- compiling --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing is compiled yet, and it would be kept in `tmp_path`/refdpo."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.library.cache_clear()
    yield tmp_path / "refdpo"
    kernels.library.cache_clear()


def kept(folder) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_compiled_once_and_again_when_the_source_changes(fresh, tmp_path, monkeypatch):
    kernels.library()
    (first,) = kept(fresh)
    inode = (fresh / first).stat().st_ino
    kernels.library.cache_clear()
    kernels.library()
    assert kept(fresh) == [first] and (fresh / first).stat().st_ino == inode
    changed = tmp_path / "kernels.cpp"
    changed.write_text(kernels.SOURCE.read_text() + "\n// changed\n")
    monkeypatch.setattr(kernels, "SOURCE", changed)
    kernels.library.cache_clear()
    kernels.library()
    assert len(kept(fresh)) == 2


def test_processes_that_compile_at_the_same_moment(fresh):
    program = "import torch; from precompute.scorer.kernels import log_sum_exp; print(log_sum_exp(torch.zeros(1, 4)).item())"
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate()[0] for process in running} == {"1.3862943649291992\n"}
    assert len(kept(fresh)) == 1


def test_without_a_compiler_the_error_says_what_to_install(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"no-such-compiler: .* needs a C\+\+ compiler; found none. .*apt-get install g\+\+"):
        kernels.library()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(InputError, match="do not compile"):
        kernels.library()
    assert not list(fresh.iterdir())


@pytest.mark.parametrize(
    ("layout", "dtype", "code"), [("packed", "float32", 2), ("packed", "bfloat16", 2), ("padded", "float32", 0)]
)
def test_only_packed_scoring_needs_the_compiler(fresh, tmp_path, monkeypatch, layout, dtype, code):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = tiny.save(tmp_path / "model")
    row = {"prompt": "Why? ", "chosen": "Because it can.", "rejected": "No."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = {"dataset": tmp_path / "rows.jsonl", "model": model, "ref-store": tmp_path / "store", "num-workers": 1}
    options |= {"max-length": 64, "layout": layout, "dtype": dtype}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = CliRunner().invoke(cli.main, ["precompute", *words])
    assert result.exit_code == code, result.output
    assert ("packed scoring on a CPU needs a C++ compiler" in result.output) == bool(code)


def test_a_compiler_that_fails_is_quoted(fresh, tmp_path, monkeypatch):
    broken = tmp_path / "kernels.cpp"
    broken.write_text("not C++;\n")
    monkeypatch.setattr(kernels, "SOURCE", broken)
    with pytest.raises(InputError, match="kernels do not compile: .*kernels.cpp:1:1: error"):
        kernels.library()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernels.library.cache_clear()
    with pytest.raises(InputError, match="cannot be kept.*Set XDG_CACHE_HOME"):
        kernels.library()
    kernels.library.cache_clear()


def test_a_damaged_library_is_an_error(fresh):
    def load() -> str:  # in a process of its own: one that has it open dies of the damage
        program = "from precompute.scorer.kernels import library; library()"
        return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True).stderr

    assert load() == ""
    (name,) = kept(fresh)
    os.truncate(fresh / name, 100)
    error = load()
    assert f"{fresh / name}: the compiled kernels cannot be loaded" in error and "Delete it" in error
