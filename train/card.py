"""README.md beside a trained model: what it was trained from, on what, and how. The Hub shows it as the model's card."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

SETTINGS = (
    *("loss_type", "beta", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "seed"),
)
"""Of a run's configuration: those that decide where it goes and that every run has."""


def write(folder: Path, record: dict, repo: str | None = None) -> None:
    """From the record of a finished run (train/record.py). `repo`: where the model will be on the Hub."""
    policy, store, result = record["policy"], record["store"], record["result"]
    base, name = policy["name"], repo or folder.resolve().name
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[store["dataset"]] if _on_hub(store["dataset"]) else None,
        library_name="peft" if "lora" in record else "transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "trl", "refdpo", *(["lora"] if "lora" in record else [])],
    )
    of_config = {each: record["config"].get(each) for each in SETTINGS}
    settings = {
        each: " + ".join(value) if isinstance(value, list | tuple) else value
        for each, value in of_config.items()
        if value is not None
    }
    settings |= {
        "effective_batch_size": record["effective_batch_size"],
        "max_length": record["max_length"],
        "dtype": record["dtype"],
    }
    settings |= {
        name: value if isinstance(value, (int, float, str)) else ", ".join(value) for name, value in record.get("lora", {}).items()
    }
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    text = f"""# {name}

Fine-tuned from {_shown(base, policy["revision"])} by direct preference optimization
([paper](https://huggingface.co/papers/2305.18290)) on {result["num_pairs"]:,} preference pairs of
{_shown(store["dataset"], store["dataset_revision"])}. The reference, {_shown(store["model"], store["revision"])}, was scored once, before
training. Loss {result["first_loss"]:.4f} at step 1, {result["last_loss"]:.4f} after {result["num_steps"]:,} steps.

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{name if repo else folder}")
print(generator([{{"role": "user", "content": "Why is the sky blue?"}}], max_new_tokens=128, return_full_text=False)[0])
```

| setting | value |
|---|---|
{chr(10).join(f"| `{each}` | {value} |" for each, value in settings.items())}

`run.json` has all settings, the identity of the reference's log-probs and the loss history. Made with refdpo on TRL; {versions}.
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _on_hub(name: str) -> bool:
    """Whether a name is that of a repository, rather than a path of this machine."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _shown(name: str, revision: str | None) -> str:
    """A link to a repository; of a local path its last part."""
    if not _on_hub(name):
        return f"`{Path(name).name}` (a local folder or file)"
    return f"[{name}](https://huggingface.co/{name})" + (f" at `{revision}`" if revision else "")
