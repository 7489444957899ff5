"""What bfloat16 does to a pair's logit, which decides how much of a gradient the pair gives: with stock TRL's online reference and with a store's.

    python benchmarks/rounding.py --ref-store STORE --num-pairs 40

The store's model is the reference, its weights with 2 % of noise are the policy. A pair's logit is that of `sigmoid_norm` with beta 5: 5 times the
difference of the two sides' mean log-ratio per token. Its error is taken from plain forwards in float32.

stock   both models' plain forwards in bfloat16, a sequence alone: the same shapes, so that a part of the two errors is the same and cancels
store   the policy as training packs it, the reference as the store has it
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from precompute.scorer.packing import Sequence
from store.reader import open_store
from train.packed import packed_forward, ready_to_train
from train.self_test import as_trl_pads

BETA, NOISE, LONG = 5.0, 0.02, 100
SIDES = ("chosen", "rejected")


def plain(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> float:
    """Mean log-prob of the completion's tokens."""
    ids = torch.tensor([prompt + completion])
    log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].mean().item()


def packed(model: PreTrainedModel, pair: dict) -> tuple[float, ...]:
    """The same of both sides, in the packed row of training."""
    prompt = pair["prompt_ids"]
    sequences = [Sequence(np.array(prompt + pair[f"{side}_ids"], dtype=np.int32), len(prompt)) for side in SIDES]
    with ready_to_train(model):
        log_probs = packed_forward(model, *as_trl_pads(model, sequences), ("log_probs",)).log_probs.double()
    starts = len(prompt) - 1
    return tuple(row[starts : starts + len(pair[f"{side}_ids"])].mean().item() for row, side in zip(log_probs, SIDES, strict=True))


def logit(policy: tuple[float, ...], reference: tuple[float, ...]) -> float:
    """Of a pair, from mean log-probs (chosen, rejected)."""
    return BETA * ((policy[0] - reference[0]) - (policy[1] - reference[1]))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref-store", type=Path, required=True, help="made in bfloat16")
    parser.add_argument("--num-pairs", type=int, default=40, help="the first so many")
    args = parser.parse_args()
    store = open_store(args.ref_store)
    assert store.identity.dtype == "bfloat16", f"{args.ref_store} was made in {store.identity.dtype}"

    reference = AutoModelForCausalLM.from_pretrained(store.identity.model, dtype=torch.bfloat16).eval()
    policy = AutoModelForCausalLM.from_pretrained(store.identity.model, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    for weight in policy.parameters():
        weight += NOISE * weight.float().std(correction=0) * torch.randn_like(weight, dtype=torch.float32)

    rows = []
    for pair in store.read(range(min(args.num_pairs, store.num_pairs))).to_pylist():
        completions = [pair[f"{side}_ids"] for side in SIDES]

        def of(model: PreTrainedModel, pair=pair, completions=completions) -> tuple[float, ...]:
            return tuple(plain(model, pair["prompt_ids"], each) for each in completions)

        rounded = of(policy), of(reference)
        exact = of(policy.float()), of(reference.float())
        policy.bfloat16(), reference.bfloat16()  # of weights that are bfloat16's, nothing is lost
        of_store = tuple(float(np.mean(pair[f"{side}_token_logps"])) for side in SIDES)
        trained = packed(policy, pair)
        found = [logit(*each) for each in (exact, rounded, (trained, of_store), (trained, exact[1]))]
        rows.append((min(map(len, completions)), *found))

    shortest, exact, *others = np.array(rows).T
    print(f"{len(rows)} pairs; logits without rounding: rms {np.sqrt((exact**2).mean()):.3f}. Errors, rms:")
    print(f"{'':34}{'all':>8}{f'>= {LONG} tokens':>16}{'shorter':>10}")
    names = ("stock, online reference", "store", "store, if it were made in float32")
    for name, errors in zip(names, (each - exact for each in others), strict=True):
        parts = (errors, errors[shortest >= LONG], errors[shortest < LONG])
        each = [f"{np.sqrt((part**2).mean()):.3f}" if len(part) else "—" for part in parts]
        print(f"{name:34}{each[0]:>8}{each[1]:>16}{each[2]:>10}")


if __name__ == "__main__":
    main()
