"""The face of this room: all that both phases use of it. What stands behind is imported here and nowhere else outside.

Needs torch; packing.py, which needs numpy alone, and adapter.py, which needs nothing, are the rest of the face.
"""

from precompute.scorer.attention import (
    NAME,
    PackedRow,
    active_kernel,
    named_kernel,
    packed_attention,
    refuse_unpackable,
    refuse_without_kernels,
    row_outputs,
    set_attention,
    use_kernel,
)
from precompute.scorer.budget import MOST, SHARE, MemoryWatch, enough_memory, free_memory, largest_budget
from precompute.scorer.compiled import advice, compiler_wanted, named_compiler, use_compiled_layers, use_compiler
from precompute.scorer.cpu import give_back_freed_memory, keep_freed_memory, use_fast_linears
from precompute.scorer.cpu_head import head_values
from precompute.scorer.forwards import replaced
from precompute.scorer.gated import use_gated_kernel
from precompute.scorer.head import head_of
from precompute.scorer.kernels import library
from precompute.scorer.model import (
    chat_template_sha256,
    config_sha256,
    load_base,
    load_in_4bit,
    load_model,
    load_tokenizer,
    refuse_too_large,
    tokenizer_sha256,
    versions,
    weights_sha256,
    without_weights,
)
from precompute.scorer.norms import use_fused_norms
from precompute.scorer.rescore import TOLERANCE, Rescored, rescore
from precompute.scorer.rope import refuse_dynamic, refuse_mixed, together
from precompute.scorer.scoring import SCORER_VERSION, score, score_batches
from precompute.scorer.self_test import SelfTest, alone_logps, attempt, compare, made_up, self_test
from precompute.scorer.spread import more_room
from precompute.scorer.twin import twin_of
