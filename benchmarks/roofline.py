"""One optimizer step of OLMo 3's 7B on four GPUs, by counts: what they compute and move, what the host launches and waits for, and what that takes at published rates.

    python benchmarks/roofline.py            arithmetic, in seconds; nothing is timed

1. draw     pairs whose lengths have the median and the 95th percentile of the whole set
2. deal     them to micro-steps and ranks with the product's own code, under the budget that `auto` chooses for the memory of such a GPU
3. add up   for each micro-step the rank with the most work: products, attention and bytes at their rates; or the host's launches, if they take longer.
            The reduction of the gradients hides behind the backward where that is longer

An upper bound of speed in all but its rates: no kernel is slower than its kind, nothing else is waited for.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from shapes import SHAPES

PAIRS, WORLD, STEPS = 128, 4, 100
LAYERS, HIDDEN, VOCABULARY = 32, 4096, 100_352
TOKENS = 16_384
"""For which benchmarks/traffic.py's bytes are given."""


@dataclass(frozen=True)
class Gpu:
    """Published rates, and what is taken of them."""

    name: str
    memory: float
    products: float
    bandwidth: float
    link: float
    """One direction of NVLink."""


GPUS = (
    Gpu("H100", 80e9, 0.7 * 989e12, 0.8 * 3.35e12, 0.67 * 450e9),
    Gpu("B200", 180e9, 0.7 * 2250e12, 0.8 * 8.0e12, 0.67 * 900e9),
)
ATTENTION = 300e12
"""FLOP/s that flash attention 2 reaches on either, as reported."""
LAUNCH, WAIT = 20e-6, 50e-6
"""Seconds of the host: 7,850 launches take it 100 to 220 ms in PyTorch."""


@dataclass(frozen=True)
class Set:
    """Lengths of the longer side, and what stands beside it, as shares of it: counted on samples of the sets."""

    name: str
    num_pairs: int
    median: float
    p95: float
    max_length: int
    prompt: float
    shorter: float
    """Of the longer completion."""

    def draw(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """prompt, longer and shorter completion: int [pairs], cut to the length as precompute cuts them."""
        sigma = math.log(self.p95 / self.median) / NormalDist().inv_cdf(0.95)
        longer = np.random.default_rng(0).lognormal(math.log(self.median), sigma, number)
        prompt = longer * self.prompt
        sides = [np.minimum(prompt + (longer - prompt) * share, self.max_length) - prompt for share in (1.0, self.shorter)]
        fits = prompt < self.max_length - 1
        return tuple(np.maximum(each[fits], 1).astype(np.int64) for each in (prompt, *sides))


SETS = (Set("Think", 150_000, 2138, 15433, 8192, 0.20, 0.63), Set("Instruct", 259_922, 682, 3521, 2048, 0.31, 0.55))


@dataclass(frozen=True)
class Counts:
    """Of a micro-step of 32 layers, and what the one with the optimizer's step has besides: two ranks on made-up GPUs (tests/made_up_gpu), 4 and
    8 layers, and the line through both. Those of 7,850 were counted before norms were one operator; 2,500 are a forward's for the reference."""

    launches: int
    collectives: int
    waits: int
    step_launches: int = 0
    step_collectives: int = 5
    step_waits: int = 5


@dataclass(frozen=True)
class Way:
    """How a step is divided and computed."""

    name: str
    checkpointing: bool
    counts: Counts
    layer_bytes: float
    """Element-wise, of a layer and TOKENS tokens, forward and backward (benchmarks/traffic.py --shape 7B --training)."""
    kept: float
    """Bytes per token until the backward."""
    gradient_bytes: float
    """Per parameter and micro-step: into a bucket, divided, a quarter of it added up. Read in DeepSpeed's ZeRO-2."""
    micro_batch: int | None = None
    """Pairs; None: by tokens."""
    stock: bool = False
    """TRL's: padded, each prompt twice, a reference that runs too."""


def ways(memory_plan) -> list[Way]:
    """Stock TRL; this project with micro-batches of one pair, as it began; by tokens, as it is."""
    kept = 20.8 * 2 * HIDDEN * LAYERS
    now = memory_plan.gradient_checkpointing
    return [
        Way("stock TRL, 4 pairs", True, STOCK, 82.0e9, 2 * HIDDEN * LAYERS, 9.5, micro_batch=4, stock=True),
        Way("by pairs, 1 pair", True, BY_PAIRS, 82.0e9, 2 * HIDDEN * LAYERS, 9.5, micro_batch=1),
        Way(
            "by tokens",
            now,
            BY_TOKENS_CHECKPOINTED if now else BY_TOKENS,
            37.3e9 if now else 29.2e9,
            2 * HIDDEN * LAYERS if now else kept,
            12.5,
        ),
    ]


STOCK = Counts(launches=7850 + 2500, collectives=16, waits=24, step_launches=2761)
BY_PAIRS = Counts(launches=7850, collectives=16, waits=24, step_launches=2761)
BY_TOKENS_CHECKPOINTED = Counts(launches=4880, collectives=1, waits=1, step_launches=2761)
BY_TOKENS = Counts(launches=4080, collectives=1, waits=1, step_launches=2761)


def plan_memory(gpu: Gpu, longest: int, most_useful: float):
    """What `--tokens-per-batch auto` chooses, of bytes that were counted (docs/olmo3.md)."""
    from precompute.scorer.budget import SHARE
    from train.memory import Cost, Measured, choose

    stream, inside = 2 * HIDDEN * LAYERS, 20.8 * 2 * HIDDEN
    measured = Measured(
        free=SHARE["cuda"] * (gpu.memory - 2 * parameters()),
        kept=Cost(inside * LAYERS, 0.0),
        checkpointed=Cost(stream + inside, 0.0),
        backward=5.5 * parameters() + 2e9,
        step=5.0 * parameters() + 2e9,
    )
    return choose(measured, longest=longest, most_useful=math.ceil(most_useful), gradient_checkpointing=None)


def body() -> int:
    shape = SHAPES["7B"]
    return LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * shape["intermediate_size"])


def parameters() -> int:
    return body() + 2 * VOCABULARY * HIDDEN


class Pairs:
    """What each pair costs: FLOPs of a forward, tokens, completion tokens."""

    def __init__(self, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray):
        from train.data import Lengths
        from train.flops import PairFlops

        self.lengths = Lengths(prompt, chosen, rejected)
        window = SHAPES["7B"]["sliding_window"]
        windows = tuple(None if layer % 4 == 3 else window for layer in range(LAYERS))
        of = (prompt, chosen, rejected)
        self.linear = PairFlops(body(), 0, (), ()).of_pairs(*of) / 3
        self.head = PairFlops(0, VOCABULARY * HIDDEN, (), ()).of_pairs(*of) / 3
        self.attention = PairFlops(0, 0, (HIDDEN,) * LAYERS, windows).of_pairs(*of) / 3
        self.needed = 3 * (self.linear + self.head + self.attention)
        self.scored = chosen + rejected


@dataclass
class Work:
    """Of one rank in one micro-step, or sums of these."""

    products: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0

    def seconds(self, gpu: Gpu) -> float:
        return self.products / gpu.products + self.attention / ATTENTION + self.bytes / gpu.bandwidth


def work_of(pairs: Pairs, members: list[int], way: Way) -> Work:
    again = int(way.checkpointing)
    scored = float(pairs.scored[members].sum())
    if (
        way.stock
    ):  # every row as long as the longest, attention under a mask over the whole square, one more forward for the reference
        length = int(pairs.lengths.longer[members].max())
        tokens = 2 * len(members) * length
        linear, attention = 2.0 * body() * tokens, 4.0 * HIDDEN * LAYERS * tokens * length
        reference, of_reference = 1, 2 * 9.11e9 / TOKENS * LAYERS * tokens
    else:
        tokens = int(pairs.lengths.packed[members].sum())
        linear, attention = pairs.linear[members].sum(), pairs.attention[members].sum()
        reference, of_reference = 0, 0.0
    head = pairs.head[members].sum()
    return Work(
        products=(3 + again + reference) * linear + (4 + reference) * head,  # TRL's head computes its logits again in the backward
        attention=(3.5 + again + reference) * attention,  # flash attention's backward has five products
        bytes=way.layer_bytes / TOKENS * LAYERS * tokens
        + 12.0 * VOCABULARY * scored
        + of_reference
        + way.gradient_bytes * parameters(),
    )


def dealt(pairs: Pairs, way: Way, budget: int) -> list[list[list[list[int]]]]:
    """[steps][micro-steps][ranks] lists of pairs."""
    from train.balance import BalancedSampler, Shape, shuffled
    from train.bins import Bins

    packed = pairs.lengths.packed
    if way.micro_batch is None:
        bins = Bins(packed, pairs.lengths.chosen, pairs_per_step=PAIRS, world=WORLD, rank=0, budget=budget, seed=42)
        return [
            [[list(each.pairs) if each.weight else [] for each in micro_step] for micro_step in bins.dealt(step)]
            for step in bins.steps(0)
        ]
    shape = Shape(way.micro_batch, WORLD, PAIRS // (WORLD * way.micro_batch))
    order = shuffled(len(packed), 42, 0) if way.stock else np.array(list(BalancedSampler(packed, shape, seed=42)))
    order = order[: len(order) // PAIRS * PAIRS]
    return order.reshape(-1, shape.steps, WORLD, way.micro_batch).tolist()


def of_step(pairs: Pairs, way: Way, gpu: Gpu, budget: int) -> dict[str, float]:
    """Means of an optimizer step; of what ranks share unevenly, of the one that computes most in each micro-step."""
    steps = dealt(pairs, way, budget)
    counts, num_micro_steps = way.counts, len(steps[0])
    host = counts.launches * LAUNCH + (counts.collectives + counts.waits) * WAIT
    reduction = 2 * parameters() * 2 * (WORLD - 1) / WORLD / gpu.link
    total, seconds, waiting = Work(), 0.0, {"host": 0.0, "reduction": 0.0}
    for step in steps:
        for micro_step in step:
            work = max((work_of(pairs, members, way) for members in micro_step if members), key=lambda each: each.seconds(gpu))
            device = work.seconds(gpu)
            exposed = max(0.0, reduction - device * 2 / 3)
            waiting["host"] += max(0.0, host - device)
            waiting["reduction"] += exposed
            seconds += max(device, host) + exposed
            total = Work(total.products + work.products, total.attention + work.attention, total.bytes + work.bytes)
    number = len(steps)
    adam = parameters() / WORLD * 34 / gpu.bandwidth
    gather = 2 * parameters() * (WORLD - 1) / WORLD / gpu.link
    once = adam + gather + counts.step_launches * LAUNCH + (counts.step_waits + counts.step_collectives) * WAIT
    used = seconds / number + once
    flops = pairs.needed[: number * PAIRS].sum() / number
    return {
        "micro-steps": num_micro_steps,
        "kernel launches": num_micro_steps * counts.launches + counts.step_launches,
        "collectives": num_micro_steps * counts.collectives + counts.step_collectives,
        "times the host waits": num_micro_steps * counts.waits + counts.step_waits,
        "gradients reduced, GB": num_micro_steps * 2 * parameters() / 1e9,
        "element-wise TB": total.bytes / number / 1e12,
        "kept per token, MB": way.kept / 1e6,
        "matrix PFLOP": total.products / number / 1e15,
        "attention PFLOP": total.attention / number / 1e15,
        "products, s": total.products / number / gpu.products,
        "attention, s": total.attention / number / ATTENTION,
        "element-wise, s": total.bytes / number / gpu.bandwidth,
        "waiting for the host, s": waiting["host"] / number,
        "reductions not hidden, s": waiting["reduction"] / number,
        "Adam and weights, s": once,
        "together, s": used,
        "pairs per second": PAIRS / used,
        "MFU": flops / used / (WORLD * gpu.products / 0.7),
    }


def show() -> None:
    for each in SETS:
        pairs = Pairs(*each.draw(PAIRS * STEPS))
        packed = pairs.lengths.packed
        print(f"\n## {each.name}, {PAIRS} pairs of at most {each.max_length:,} tokens: {packed.mean():,.0f} packed tokens a pair\n")
        for gpu in GPUS:
            plan = plan_memory(gpu, int(packed.max()), packed.mean() * PAIRS / WORLD)
            rows = [of_step(pairs, way, gpu, plan.tokens_per_batch) for way in ways(plan)]
            again = "with" if plan.gradient_checkpointing else "without"
            print(f"{gpu.name}: `auto` takes {plan.tokens_per_batch:,} tokens {again} gradient checkpointing\n")
            print("| of one optimizer step, each of 4 GPUs | " + " | ".join(way.name for way in ways(plan)) + " |")
            print("|---|" + "---:|" * len(rows))
            for name in rows[0]:
                print(f"| {name} | " + " | ".join(_number(name, row[name]) for row in rows) + " |")
            hours = [each.num_pairs / row["pairs per second"] / 3600 for row in rows]
            print(f"| hours for {each.num_pairs:,} pairs | " + " | ".join(f"{value:,.1f}" for value in hours) + " |\n")


def _number(name: str, value: float) -> str:
    if name == "MFU":
        return f"{value:.0%}"
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"


if __name__ == "__main__":
    show()
