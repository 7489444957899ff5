"""What the train tests share: a byte tokenizer, plain-text preference rows, and stores whose reference values come from
a plain Hugging Face forward written here (not from precompute)."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch
from tiny import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from precompute.scorer.model import chat_template_sha256, config_sha256, tokenizer_sha256, weights_sha256
from store.folder import prepare_store
from store.manifest import Identity, ShardReport
from store.reader import Store, open_store
from store.schema import SCHEMA
from store.seal import seal
from store.shard import publish_shard
from train.config import ZERO2, TrainConfig

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
MAX_LENGTH = 96

DPO_SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "deepspeed": str(ZERO2),
    "report_to": "none",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "beta": 0.1,
    "max_length": MAX_LENGTH,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "remove_unused_columns": False,
}
"""DPOConfig's, for trainers that are compared with stock TRL's under DeepSpeed: four pairs to a rank's step."""

SCHEDULE_STEPS, SCHEDULE_WARMUP = 12, 3
SCHEDULE_ARGUMENTS = {
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 4},
}
"""Those that look at the learning rate that the optimizer began with are asked to."""


def run_config(folder: Path, **changes) -> TrainConfig:
    """A short run over folder/store into folder/run. Without `changes` its micro-batches have two pairs, its steps eight."""
    usual = {
        "ref_store": folder / "store",
        "output_dir": folder / "run",
        "loss_type": ("sigmoid",),
        "beta": 0.1,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "per_device_train_batch_size": 2,
        "effective_batch_size": 8,
        "gradient_checkpointing": True,
    }
    return TrainConfig(**usual | changes)


@dataclass(frozen=True)
class World:
    """A model folder (with tokenizer), rows, and where their store lies."""

    model: Path
    store: Path
    rows: tuple[dict, ...]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that prompt + completion is tokenized as its parts are; <eos> = 256, <pad> = 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


def make_rows(num_rows: int, seed: int = 0) -> tuple[dict, ...]:
    """Plain-text rows of lengths all different, the shortest prompt one token."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefghij klmno") for _ in range(rng.randint(low, high)))

    return tuple({"prompt": text(1, 40), "chosen": text(1, 48), "rejected": text(1, 48)} for _ in range(num_rows))


def token_logps(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probs of the completion's tokens by the plain definition: one unpadded sequence, logits, log_softmax in float32, gather."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0].tolist()


def make_store(
    path: Path, model_folder: Path, rows: tuple[dict, ...], dtype: str = "float32", shift: float = 0.0, **identity
) -> Store:
    """Score `rows` with the model in `model_folder` and seal the result. `shift` is added to every ref_chosen_logps, on its first token."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    this = Identity(
        **{
            "model": str(model_folder),
            "revision": None,
            "tokenizer": str(model_folder),
            "dataset": "rows of a test",
            "split": "train",
            "dataset_revision": None,
            "weights_sha256": weights_sha256(model),
            "config_sha256": config_sha256(str(model_folder)),
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "chat_template_sha256": chat_template_sha256(tokenizer),
            "dataset_fingerprint": "f" * 64,
            "num_rows": len(rows),
            "max_length": MAX_LENGTH,
            "truncation": "keep_start",
            "dtype": dtype,
            "shard_size": 16,
            "scorer_version": 1,
            **identity,
        }
    )
    pairs = [_pair(model, tokenizer, row, index, shift) for index, row in enumerate(rows)]
    prepare_store(path, this)
    for shard in range(this.num_shards):
        block = [pairs[row] for row in this.rows_of(shard)]
        report = ShardReport(len(block), (), {}, {}, 0, 0, 0, shard, block[0]["row"], len(block))
        publish_shard(path, this, report, pa.Table.from_pylist(block, schema=SCHEMA), {})
    seal(path, this, {}, None)
    return open_store(path)


def _pair(model, tokenizer, row: dict, index: int, shift: float) -> dict:
    prompt = tokenizer(row["prompt"])["input_ids"]
    pair = {"pair_id": f"{index:032x}", "row": index, "prompt_ids": prompt, "num_prompt_tokens": len(prompt)}
    for side in ("chosen", "rejected"):
        ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"][len(prompt) :]
        logps = torch.tensor(token_logps(model, prompt, ids), dtype=torch.float32)
        logps[0] += shift if side == "chosen" else 0.0
        pair |= {
            f"{side}_ids": ids,
            f"{side}_token_logps": logps.tolist(),
            f"ref_{side}_logps": float(logps.double().sum()),
            f"num_{side}_tokens": len(ids),
            f"{side}_truncated": False,
        }
    return pair


def make_world(folder: Path, num_rows: int = 40, architecture: str = "llama", dtype: str = "float32", **changes) -> World:
    """A model, saved with its tokenizer, and the store of `num_rows` rows under it."""
    make_model(architecture).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    world = World(folder / "model", folder / "store", make_rows(num_rows))
    make_store(world.store, world.model, world.rows, dtype, **changes)
    return world


def with_store(world: World, path: Path, **options) -> World:
    """The same rows and model, scored into another store."""
    make_store(path, world.model, world.rows, **options)
    return replace(world, store=path)
