"""The arithmetic of benchmarks/roofline.py: by hand, against the model itself, and as its page shows it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo3Config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import roofline
from shapes import SHAPES


def test_weights_are_those_of_the_model():
    """transformers' own class, without memory; norms' weights, 0.01 % of all, are left out."""
    config = Olmo3Config(vocab_size=roofline.VOCABULARY, tie_word_embeddings=False, **SHAPES["7B"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = {name: each.numel() for name, each in model.named_parameters() if each.dim() > 1}
    assert roofline.parameters() == sum(matrices.values())
    assert roofline.body() == sum(count for name, count in matrices.items() if ".layers." in name)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(roofline.parameters(), rel=1e-4)


def test_the_work_of_a_pair_by_hand():
    """Prompt 100, chosen 50, rejected 30, no window reached. Tokens: 180 packed, 2 x 150 padded; 80 scored. Visible keys: 5,050 of the prompt, 50 and 30 times
    it and their own, 1,275 and 465."""
    pairs = roofline.Pairs(np.array([100]), np.array([50]), np.array([30]))
    plan = roofline.plan_memory(roofline.GPUS[1], longest=1000, most_useful=1e6)
    stock, by_pairs, by_tokens = roofline.ways(plan)
    body, head, all_weights = roofline.body(), 4096 * 100_352, roofline.parameters()
    visible = 5_050 + 50 * 100 + 1_275 + 30 * 100 + 465

    assert (by_pairs.checkpointing, by_tokens.checkpointing) == (True, False)
    once, again = (roofline.work_of(pairs, [0], way) for way in (by_tokens, by_pairs))
    assert once.products == pytest.approx(3 * 2 * body * 180 + 4 * 2 * head * 80)
    assert once.attention == pytest.approx(3.5 * 4 * 4096 * 32 * visible)
    assert once.bytes == pytest.approx(29.2e9 / 16_384 * 32 * 180 + 12 * 100_352 * 80 + 12.5 * all_weights)
    assert again.products - once.products == pytest.approx(2 * body * 180)
    assert again.attention - once.attention == pytest.approx(4 * 4096 * 32 * visible)
    with_reference = roofline.work_of(pairs, [0], stock)
    assert with_reference.products == pytest.approx(5 * 2 * body * 300 + 5 * 2 * head * 80)
    assert with_reference.attention == pytest.approx(5.5 * 4 * 4096 * 32 * 300 * 150)


@pytest.mark.slow
def test_the_pages_tables_come_from_the_script(capsys):
    roofline.show()
    page = (ROOT / "docs" / "notebook" / "step_on_gpus.md").read_text(encoding="utf-8")
    printed, shown = (
        [line for line in text.splitlines() if line.startswith(("|", "## ", "H100: ", "B200: "))]
        for text in (capsys.readouterr().out, page)
    )
    assert shown == printed and len(printed) > 80
