"""The demo's model and tokenizer: OLMo 3's architecture, tiny, made from pairs.jsonl at first use and the same every time.

It has what a scorer must get right about OLMo 3: three of four layers see only a sliding window (here shorter than most pairs), query
heads share key heads, queries and keys are normalized, the head is not tied to the embedding.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from store.errors import InputError, RefdpoError

HERE = Path(__file__).parent
PAIRS = HERE / "pairs.jsonl"
CHAT_TEMPLATE = HERE / "chat_template.jinja"

RECIPE = "recipe.sha256"
"""Beside the weights: what they were made from, so that a model of other demo files is not taken for this one."""

VOCAB_SIZE = 2048
EOS, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"

# How OLMo's tokenizer cuts text before merging: words with their space, at most three digits, punctuation with the line breaks after it.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SEED = 0
BLOCK = 128  # tokens per training sequence: twice the sliding window
BATCH = 4
EPOCHS = 3
LEARNING_RATE = 1e-2


def make_demo_model(folder: Path) -> Path:
    """Make the model and its tokenizer in `folder` unless they are there already; return `folder`.

    Takes about ten seconds on one core and says so in one line on stderr. Any number of processes may call it at once: each builds in a
    folder of its own and the first to finish renames it into place, so `folder` is complete whenever it exists. The weights are the same
    bytes on every call on a machine. Raises InputError if `folder` holds anything else, a model of other demo files included, and
    RefdpoError if it cannot be written.
    """
    folder = Path(folder)
    if _is_made(folder):
        return folder
    print(f"Making the demo model in {folder} (once, about ten seconds)", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise RefdpoError(f"the demo model cannot be written: {error.strerror}", where=folder) from error
    try:
        _make(staging)
        os.rename(staging, folder)
    except OSError:
        if not _is_made(folder):  # else another process was faster, and its folder is as good
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _make(folder: Path) -> None:
    conversations = [row["prompt"] + row[side] for row in read_pairs() for side in ("chosen", "rejected")]
    tokenizer = make_tokenizer(conversations)
    model = train_model(tokenizer, conversations)
    with _no_progress_bar():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECIPE).write_text(_recipe() + "\n")
    folder.chmod(0o755)  # it began as a private temporary folder


def read_pairs() -> list[dict]:
    """The rows of pairs.jsonl: `prompt`, `chosen`, `rejected`, each a list of {role, content} turns."""
    with PAIRS.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def make_tokenizer(conversations: list[list[dict]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with OLMo's word pattern and special tokens, trained on the conversations' texts. No beginning-of-text token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((turn["content"] for turns in conversations for turn in turns), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, extra_special_tokens=[IM_START, IM_END])
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def train_model(tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict]]) -> Olmo3ForCausalLM:
    """Next-token training on chosen and rejected alike: the model knows the texts but not which of two answers is the better one."""
    config = Olmo3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,  # layer_types: sliding, sliding, sliding, full
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=64,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = [i for turns in conversations for i in tokenizer(tokenizer.apply_chat_template(turns, tokenize=False)).input_ids]
    blocks = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
    num_steps = EPOCHS * (len(blocks) // BATCH)
    with _repeatable():
        model = Olmo3ForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
        order = torch.cat([torch.randperm(len(blocks))[: num_steps // EPOCHS * BATCH] for _ in range(EPOCHS)])
        for batch in order.view(num_steps, BATCH):
            logits = model(input_ids=blocks[batch]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[batch][:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@contextmanager
def _repeatable() -> Iterator[None]:
    """Fixed seed, one thread and deterministic kernels inside; the caller's settings afterwards. Sums split over threads would round
    differently with the number of cores."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """One 1.6 MB file needs none; the caller's setting afterwards."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _recipe() -> str:
    """Hash of the files that the model is made from."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in (PAIRS, CHAT_TEMPLATE, Path(__file__)))).hexdigest()


def _is_made(folder: Path) -> bool:
    """Whether `folder` holds the model of these demo files; False if it is empty or absent. Raises InputError if it holds anything else.

    One look at the listing decides, since another process may put the whole folder there at any moment.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        names = [folder.name]
    if names and RECIPE not in names:
        raise InputError("the demo model cannot be made here: something else is in the way", where=folder, next="Move it away.")
    if names and (folder / RECIPE).read_text().strip() != _recipe():
        raise InputError(
            "the demo model was made from other demo files than these", where=folder, next=f"Make it again: rm -r {folder}"
        )
    return bool(names)
