"""What a layer moves through memory besides its matrix products and attention, counted operator by operator, as transformers runs it and as scoring does.

    python benchmarks/traffic.py --shape 7B
    python benchmarks/traffic.py --shape 7B --training     forward and backward, on a made-up GPU (tests/made_up_gpu) where there is none

On a GPU such operators take as long as their bytes. One layer in bfloat16 runs over 256 tokens; the bytes are given for --tokens. The last lines are arithmetic, not
measurements: the layer's time with the rates given, by default an H100's published ones times what large products and copies reach of them.
"""

import argparse
import gc
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import made_up_gpu

if "--training" in sys.argv and made_up_gpu.possible() and "MADE_UP_GPUS" not in os.environ:
    os.execve(sys.executable, [sys.executable, *sys.argv], made_up_gpu.environment(gib=24))

import torch
from shapes import SHAPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Olmo3Config

from precompute.scorer import attention
from precompute.scorer.attention import PackedLayout, PackedMask, packed_attention
from precompute.scorer.norms import fused_norms
from precompute.scorer.packing import Branch

TOKENS = 256
PRODUCTS = {"linear", "mm", "addmm", "bmm", "_varlen_attn", "_varlen_attn_backward"}
"""And attention."""

MOVES_NOTHING = {
    "view",
    "_unsafe_view",
    "reshape",
    "transpose",
    "t",
    "slice",
    "select",
    "unsqueeze",
    "expand",
    "permute",
    "detach",
    "alias",
}


def bytes_of(tensor: torch.Tensor) -> int:
    """What reading or writing it moves: a broadcast dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Bytes read and written by every operator called inside, by name."""

    def __init__(self):
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        nothing_new = all(any(leaf is each for each in inputs) for leaf in outputs)  # such as `to` the dtype it has
        if name not in PRODUCTS | MOVES_NOTHING and not nothing_new:
            self.moved[name] += sum(map(bytes_of, inputs)) + sum(map(bytes_of, outputs))
            self.calls[name] += 1
        return out


def count(model: torch.nn.Module, fused: bool) -> Traffic:
    hidden = torch.randn(1, TOKENS, model.config.hidden_size, dtype=torch.bfloat16)
    positions = torch.arange(TOKENS)[None]
    embeddings = model.base_model.rotary_emb(hidden, positions, "full_attention")
    attention._attend_cpu = lambda query, *_: query.transpose(1, 2)  # a GPU's is one kernel, counted by its products
    layout = PackedLayout((Branch(0, TOKENS, ()),), hidden.device)
    with torch.inference_mode(), packed_attention(model), fused_norms(model) if fused else nullcontext(), Traffic() as traffic:
        model.base_model.layers[0](
            hidden, position_embeddings=embeddings, position_ids=positions, attention_mask=PackedMask(layout, None)
        )
    return traffic


def count_training(model: torch.nn.Module, fused: bool, checkpointing: bool) -> tuple[Traffic, float]:
    """Of a forward and backward of the layer; and the bytes kept between them, per token."""
    layer = model.base_model.layers[0]
    model.train().requires_grad_(True)
    (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
    hidden = torch.randn(1, TOKENS, model.config.hidden_size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    positions = torch.arange(TOKENS, device="cuda")[None]
    embeddings = model.base_model.rotary_emb(hidden, positions, "full_attention")
    mask = PackedMask(PackedLayout((Branch(0, TOKENS, ()),), hidden.device), None)
    with packed_attention(model), fused_norms(model) if fused else nullcontext():
        gc.collect()
        with Traffic() as traffic:
            before = torch.cuda.memory_allocated()
            out = layer(hidden, position_embeddings=embeddings, position_ids=positions, attention_mask=mask)
            kept = torch.cuda.memory_allocated() - before
            out.backward(torch.ones_like(out))
    model.zero_grad()
    return traffic, kept / TOKENS


def print_training(model: torch.nn.Module, args: argparse.Namespace) -> None:
    model.to("cuda")
    print(f"{args.shape}, one layer, {args.tokens} tokens, bfloat16, forward and backward: GB moved by element-wise work (calls)")
    for checkpointing in (True, False):
        for fused in (False, True):
            traffic, kept = count_training(model, fused, checkpointing)
            moved = {name: value * args.tokens / TOKENS / 1e9 for name, value in traffic.moved.items()}
            most = sorted(moved, key=moved.get, reverse=True)[:6]
            print(
                f"{'checkpointed' if checkpointing else 'kept'}, norms of {'one operator' if fused else 'seven operators'}:"
                f" {sum(moved.values()):.1f} in {sum(traffic.calls.values())} calls, {kept / model.config.hidden_size / 2:.2f} x hidden x"
                f" 2 bytes kept of a token: {', '.join(f'{name} {moved[name]:.2f} ({traffic.calls[name]})' for name in most)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="7B")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--product-tflops", type=float, default=989 * 0.7)
    parser.add_argument("--attention-tflops", type=float, default=989 * 0.4)
    parser.add_argument("--terabytes-per-second", type=float, default=3.35 * 0.8)
    args = parser.parse_args()

    shape = SHAPES[args.shape] | {"num_hidden_layers": 1}
    config = Olmo3Config(**shape, vocab_size=128, eos_token_id=0, pad_token_id=1, layer_types=["full_attention"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if args.training:
        print_training(model, args)
        return
    weights = sum(module.weight.numel() for module in model.base_model.layers[0].modules() if isinstance(module, torch.nn.Linear))
    products = 2 * args.tokens * weights
    # Three layers of four see a window, the fourth all: per layer, on average, two products of 2 FLOPs per visible key and channel.
    window = min(shape["sliding_window"], args.tokens)
    keys = [(args.tokens + 1) * args.tokens / 2, window * args.tokens - window * (window - 1) / 2]
    attended = 4 * shape["hidden_size"] * (keys[0] / 4 + keys[1] * 3 / 4)

    print(f"{args.shape}, one layer, {args.tokens} tokens, bfloat16: GB moved by element-wise work (calls)")
    for title, fused in (("as transformers runs it", False), ("as scoring runs it", True)):
        traffic = count(model, fused)
        moved = {name: value * args.tokens / TOKENS for name, value in traffic.moved.items()}
        total = sum(moved.values())
        listed = ", ".join(
            f"{name} {moved[name] / 1e9:.2f} ({traffic.calls[name]})" for name in sorted(moved, key=moved.get, reverse=True)
        )
        print(f"{title:24} {total / 1e9:5.2f}: {listed}")
        milliseconds = [
            products / args.product_tflops / 1e9,
            attended / args.attention_tflops / 1e9,
            total / args.terabytes_per_second / 1e9,
        ]
        rate = (products + attended) / sum(milliseconds) / 1e9
        print(
            f"{'':24} products {milliseconds[0]:.2f} ms, attention {milliseconds[1]:.2f} ms, element-wise {milliseconds[2]:.2f} ms:"
            f" {rate / args.product_tflops:.2f} of the products' rate (arithmetic)"
        )


if __name__ == "__main__":
    main()
