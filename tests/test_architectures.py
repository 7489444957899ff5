"""docs/models.md says what the sweep finds, for every causal language model of the installed transformers."""

import re

import models_page
import pytest
import torch
import transformers
from architectures import NOT_MADE, UNFELT, VARIANTS, config_of, make_model, names, thresholds
from sweep import plain, sequences, sweep

SHORT = (
    "olmo3",
    "qwen3_moe, no window",
    "gemma2",
    "gemma4_text",
    "gpt_oss",
    "granite",
    "deepseek_v3",
    "nemotron",
    "phi3, RoPE longrope",
    "qwen2_moe",
    "modernbert-decoder",
    "falcon, alibi",
    "lfm2",
)
"""One of each kind: swept in seconds."""

LONG = [name for name in names() if name not in SHORT and name not in NOT_MADE]


@pytest.fixture(scope="module")
def expected():
    return models_page.read()


@pytest.fixture(autouse=True)
def quiet():
    before = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(before[0])
    transformers.logging.set_verbosity(before[1])


def test_the_page_has_every_architecture(expected):
    missing = sorted(set(names()) - NOT_MADE.keys() - expected.keys())
    gone = sorted(expected.keys() - set(names()))
    assert not missing, (
        f"docs/models.md lacks {missing}: run python tests/models_page.py (a config that cannot be made small goes into OVERRIDES)"
    )
    assert not gone, f"docs/models.md has what this transformers lacks: {gone}: run python tests/models_page.py"
    assert set(SHORT) <= expected.keys()
    assert all(model_type in names() for model_type, _ in VARIANTS.values()) and NOT_MADE.keys() <= set(names())


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_the_page_says_what_the_sweep_finds(name, expected):
    outcomes = sweep(name)
    found, page = (
        {way: (each.verdict, each.detail if each.verdict == "refused" else "") for way, each in of.items()}
        for of in (outcomes, expected[name])
    )
    assert found == page, f"{outcomes}; if that is right: python tests/models_page.py '{name}'"


def test_nothing_is_wrong_in_silence(expected):
    verdicts = {name: {way: outcome.verdict for way, outcome in outcomes.items()} for name, outcomes in expected.items()}
    assert not {name: found for name, found in verdicts.items() if not set(found.values()) <= {"right", "refused"}}


def test_the_page_is_as_it_is_written(expected):
    """No line was changed by hand but one that a sweep will tell."""
    version = re.search(r"transformers (\S+),", models_page.PAGE.read_text()).group(1)
    assert models_page.page(expected, version) == models_page.PAGE.read_text()


@pytest.mark.parametrize(
    "name", ["olmo3", *(pytest.param(name, marks=pytest.mark.slow) for name in names() if name not in {*NOT_MADE, "olmo3"})]
)
def test_a_tiny_model_feels_its_thresholds(name):
    """A window that changes nothing in a tiny model would let a layout without windows pass."""
    longest = max(sequences(), key=lambda sequence: len(sequence.ids))
    with torch.no_grad():
        expected = plain(make_model(config_of(name)), longest)
        for field in thresholds(config_of(name)):
            config = config_of(name)
            setattr(config.get_text_config(), field, 4 * len(longest.ids))
            if field == "local_attention":  # ModernBERT's window is half of it
                config.sliding_window = 2 * len(longest.ids)
            difference = float((plain(make_model(config), longest) - expected).abs().max())
            assert (difference > 0.01) != ((name, field) in UNFELT), (field, difference)
