"""A small random model of the same class and configuration as a large one, in float32: the same code on sizes that cost milliseconds.

Widths, layers, experts and vocabulary are cut down; lengths at which the model changes (a sliding window, the context before RoPE is extended, a
chunk) become a few dozen tokens, so that short sequences lie on both sides of them. What stays is what decides how a sequence is computed.
"""

import copy
import re
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from precompute.scorer.spread import devices_of, spread

LAYERS = 2
"""Layers kept, at least; one of each kind."""

VOCABULARY = 128

LENGTHS = (24, 48, 72, 96)
"""What the model's lengths become, the shortest first. All are above packing.MIN_SHARED."""

LENGTH_NAME = re.compile(
    r"^(?!.*(pattern|layers)).*(window|original_max_position|chunk_size|local_attention|block_size|index_topk)"
)
"""Entries of a configuration that are numbers of tokens. A window that is no number (a switch, None) stays."""

NUMBER = re.compile(r"(^|\.)\d+")
"""A place in a list of modules, of which there may be any number."""

PLAIN = (bool, int, float, str)

EXPERTS = re.compile(r"^(num|n|moe_num)_(\w+_)?experts$|^moe_num_experts$")
EXPERTS_PER_TOKEN = re.compile(r"experts_per_tok|^top_k$|moe_top_?k$")
WIDTHS = re.compile(r"intermediate_size|ffn_dim|ffn_hidden_size|n_inner")


@dataclass(frozen=True)
class Twin:
    """The small model, on the devices of the large one, and the lengths at which it changes."""

    model: PreTrainedModel
    lengths: tuple[int, ...]
    num_missing: int = 0
    """Kinds of layers that it lacks."""


def twin_of(model: PreTrainedModel) -> Twin | None:
    """None where no smaller model of this configuration can be made that gives finite numbers: the configuration's parts depend on each other
    in a way of their own. With one layer of each kind, if it can be."""
    place = _layers(model)
    kinds = _kinds_of_layers(model, place)
    found: list[Twin] = []
    first = partial(_first_layers, max([LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    # Some architectures make every n-th layer another: there the first ones are kept, up to the last new kind.
    by_layers = [(cut, *more) for more in ((_cut_entries, _cut_heads), (_cut_entries,), ()) for cut in (_cut_layers, first)]
    for cuts in (*by_layers, ()):
        config = copy.deepcopy(model.config)
        try:
            lengths = _cut_lengths(config.get_text_config())
            for cut in cuts:
                cut(config.get_text_config())
            for other in _others(config):  # towers for pictures and sound
                _cut_layers(other)
            small = _random(type(model), config, model)
        except Exception:  # noqa: BLE001, S112 - a configuration raises what it likes when its parts do not fit; try a closer one
            continue
        if small is not None:
            found.append(Twin(small, lengths, len(set(kinds) - set(_kinds_of_layers(small, place)))))
            if not found[-1].num_missing:
                break
    return min(found, key=lambda twin: twin.num_missing, default=None)


def _layers(model: PreTrainedModel) -> str | None:
    """Where the list of the text's layers is; None where no list of modules is as long as the configuration says."""
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.ModuleList) and len(each) == num_layers
    ]
    return max(lists, key=lambda each: len(list(each[1].modules())), default=(None,))[0]


def _kinds_of_layers(model: PreTrainedModel, place: str | None) -> list[tuple]:
    """What each layer is made of and how it is set, but for sizes: classes, switches, names, and which numbers are None."""
    layers = () if place is None else model.get_submodule(place).children()
    return [
        tuple(sorted({(NUMBER.sub("", name), *_settings(module)) for name, module in layer.named_modules()})) for layer in layers
    ]


def _settings(module: torch.nn.Module) -> tuple[str, ...]:
    named = (
        (name, value) for name, value in vars(module).items() if not name.startswith("_") and name not in ("training", "layer_idx")
    )
    told = (
        f"{name}={'a number' if type(value) in (int, float) else value}"
        for name, value in named
        if value is None or isinstance(value, PLAIN)
    )
    return type(module).__name__, *sorted(told)


def _first_layers(num_kept: int, config) -> None:
    num_layers = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if _per_layer(name, value, num_layers):
            vars(config)[name] = value[:num_kept]
    config.num_hidden_layers = min(num_kept, num_layers)


def _others(config) -> list:
    """Configurations inside `config` beside the text's."""
    text = config.get_text_config()
    inner = [each for each in vars(config).values() if isinstance(each, PreTrainedConfig) and each is not text]
    return [each for each in inner if hasattr(each, "num_hidden_layers")]


def _random(kind: type[PreTrainedModel], config, like: PreTrainedModel) -> PreTrainedModel | None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config.dtype = torch.float32
        if sum(each.numel() for each in _on_meta(kind, config).parameters()) > 50_000_000:
            return None
        small = kind._from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in small.parameters():
            # Products keep their inputs' scale and attention is far from even, so that a wrong key, position or factor shows.
            if parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    small = spread(small, devices_of(like))
    with torch.inference_mode():
        tokens = torch.arange(2, 2 * LENGTHS[0], device=like.device)[None]
        finite = torch.isfinite(small(input_ids=tokens, use_cache=False).logits).all()
    return small if finite else None


def _on_meta(kind: type[PreTrainedModel], config) -> PreTrainedModel:
    with torch.device("meta"):
        return kind._from_config(copy.deepcopy(config))


def lengths_of(config) -> list[int]:
    """Numbers of tokens at which a model of this (text) configuration changes, as far as its entries name them; ascending."""
    return sorted({holder[name] for holder, name in _length_entries(config)})


def _length_entries(config) -> list[tuple[dict, str]]:
    places = [(vars(config), name) for name in vars(config) if LENGTH_NAME.match(name)]
    for name in ("rope_parameters", "rope_scaling"):
        places += [(each, key) for each in _dicts(getattr(config, name, None)) for key in each if LENGTH_NAME.match(key)]
    once = {(id(holder), name): (holder, name) for holder, name in places}  # rope_scaling may be another name of rope_parameters
    return [(holder, name) for holder, name in once.values() if type(holder[name]) is int and holder[name] > 0]


def _cut_lengths(config) -> tuple[int, ...]:
    """Each of the model's lengths becomes one of LENGTHS, in their order; returns those."""
    short = {length: min(length, LENGTHS[min(index, len(LENGTHS) - 1)]) for index, length in enumerate(lengths_of(config))}
    for holder, name in _length_entries(config):
        holder[name] = short[holder[name]]
    return tuple(sorted(set(short.values())))


def _dicts(value) -> list[dict]:
    """A dict and the dicts in it."""
    return [value, *(inner for each in value.values() for inner in _dicts(each))] if isinstance(value, dict) else []


def _cut_layers(config) -> None:
    """One layer of each kind, at least LAYERS; lists with an entry per layer keep those of the kept layers."""
    num_layers = config.num_hidden_layers
    kinds = [
        tuple(str(value[layer]) for name, value in sorted(vars(config).items()) if _per_layer(name, value, num_layers))
        for layer in range(num_layers)
    ]
    first = [layer for layer in range(num_layers) if kinds[layer] not in kinds[:layer]]
    dense = getattr(config, "first_k_dense_replace", None) or 0
    kept = sorted({*first[:4], *range(min(LAYERS, num_layers)), min(dense, num_layers - 1)})
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if shared:  # the last layers use keys of earlier ones of their kind
        kept = sorted(
            {
                *kept,
                *(layer for layer in range(num_layers - shared, num_layers) if layer in _first_from(kinds, num_layers - shared)),
            }
        )
        vars(config)["num_kv_shared_layers"] = sum(layer >= num_layers - shared for layer in kept)
    for name, value in list(vars(config).items()):
        if _per_layer(name, value, num_layers):
            vars(config)[name] = type(value)(value[layer] for layer in kept)
    if dense:
        vars(config)["first_k_dense_replace"] = sum(layer < dense for layer in kept)
    if getattr(config, "max_window_layers", None) is not None:
        vars(config)["max_window_layers"] = sum(layer < config.max_window_layers for layer in kept)
    config.num_hidden_layers = len(kept)


def _first_from(kinds: list[tuple], start: int) -> set[int]:
    return {start + index for index in range(len(kinds) - start) if kinds[start + index] not in kinds[start : start + index]}


def _per_layer(name: str, value: object, num_layers: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == num_layers and not name.endswith("_ids") and name != "architectures"


def _cut_entries(config) -> None:
    """Vocabulary, inner widths, experts."""
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and isinstance(value, (int, list)):
            vars(config)[name] = None if name != "pad_token_id" or isinstance(value, list) else min(value, VOCABULARY - 1)
        elif type(value) is list and WIDTHS.search(name):
            vars(config)[name] = [min(each, 64) for each in value]
        elif type(value) is not int or value <= 0:
            continue
        elif name.startswith("vocab_size"):
            vars(config)[name] = min(value, VOCABULARY)
        elif WIDTHS.search(name):
            vars(config)[name] = min(value, 64)
        elif EXPERTS.search(name):
            vars(config)[name] = min(value, 8)
        elif EXPERTS_PER_TOKEN.search(name) or name in ("n_group", "num_expert_group"):
            vars(config)[name] = min(value, 2)
        elif name in ("topk_group", "topk_groups"):
            vars(config)[name] = min(value, 1)


def _cut_heads(config) -> None:
    """Two key heads at most and two query heads for each, of their own width."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = min(2, heads // kv_heads) if kv_heads else 1
    few = min(2, kv_heads or heads)
    config.num_attention_heads = few * groups
    if kv_heads is not None:
        config.num_key_value_heads = few
    before, config.hidden_size = config.hidden_size, few * groups * head_width
    if state_heads := getattr(config, "mamba_n_heads", None):  # of their own width, on a multiple of the hidden size
        config.mamba_n_heads = max(1, state_heads * config.hidden_size // before)
