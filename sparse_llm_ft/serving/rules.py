"""The serving contract: what each loader does with a PEFT adapter, as functions from its facts to findings.

Every rule names the code that it was read in. A loader that ignores a setting without an error gives wrong answers,
which only its source can tell; a rule that a test has run against the loader's own code says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sparse_llm_ft.plan import ModuleName
from sparse_llm_ft.serving.facts import AdapterFacts
from sparse_llm_ft.serving.ranks import SGMV_LARGEST_RANK, VLLM_DEFAULT_RANK, VLLM_RANKS, max_lora_rank, padded_rank

Kind = Literal["refused", "wrong", "unknown", "option", "note"]


@dataclass(frozen=True)
class Finding:
    """What one rule says: the loader refuses the adapter, computes something else, does what was not read, needs an
    option, or a remark.
    """

    kind: Kind
    text: str


Rule = Callable[[AdapterFacts], Iterator[Finding]]


# --- PEFT: huggingface/peft 0.21, tuners/lora/model.py and utils/save_and_load.py -------------------------------------


def peft_shapes(facts: AdapterFacts) -> Iterator[Finding]:
    """PEFT builds each module at the rank of `rank_pattern` or `r`, and loads no tensor of another size."""
    for module, pair in facts.pairs.items() if facts.is_lora else ():
        if pair.rank != facts.rank(module):
            yield Finding("refused", f"{module} has rank {pair.rank} and its config says {facts.rank(module)}")
            return


def peft_type(facts: AdapterFacts) -> Iterator[Finding]:
    """PEFT itself knows every peft_type but this package's."""
    if facts.config["peft_type"] == "SPARSE_LORA":
        yield Finding("refused", "it is of this package's own tuner; `sparse-llm-ft export --to peft` writes a LoRA")


# --- What the rules of servers cover ----------------------------------------------------------------------------------


def covers_writers(facts: AdapterFacts) -> Iterator[Finding]:
    """Servers take adapters of models that write. No other was read."""
    if (task := facts.config.get("task_type")) not in ("CAUSAL_LM", None):
        yield Finding("unknown", f"its code was read for CAUSAL_LM, and task_type is {task!r:.40}")


def covers_vllm(facts: AdapterFacts) -> Iterator[Finding]:
    """From 0.32 on, a head may come with an adapter (`vllm_heads`)."""
    if facts.config.get("task_type") != "SEQ_CLS":
        yield from covers_writers(facts)


def covers_modules(facts: AdapterFacts) -> Iterator[Finding]:
    """Names were read of decoders' linear layers: experts have rules of their own, and encoders other loaders."""
    for part in ("encoder", "experts"):
        if found := [module for module in facts.pairs if part in module.split(".")]:
            yield Finding("unknown", f"no rule here covers {_count(found)}")


# --- vLLM: vllm-project/vllm, vllm/lora/peft_helper.py, vllm/lora/utils.py, vllm/config/lora.py -----------------------

_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # `_init_is_supported`
_VLLM_FLAGS = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "alora_invocation_tokens": "Activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}  # `_validate_features`


def not_a_lora(facts: AdapterFacts) -> Iterator[Finding]:
    """Loaders know tensors of LoRA alone: vLLM's `parse_fine_tuned_lora_name` raises at others, SGLang asserts the
    peft_type (srt/lora/lora.py, `LoRAAdapter.__init__`), llama.cpp's converter exits at names without ``.weight``.
    """
    if not facts.is_lora:
        yield Finding("refused", f"peft_type {facts.config['peft_type']} is not LORA")


def vllm_features(facts: AdapterFacts) -> Iterator[Finding]:
    """`validate_legal` refuses whatever vLLM does not compute."""
    if found := [label for key, label in _VLLM_FLAGS.items() if facts.config.get(key)]:
        yield Finding("refused", f"it does not take {', '.join(found)}")
    init = facts.config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _VLLM_INITS:
        yield Finding("refused", f"init_lora_weights {init!r:.40} changes the base's weights")
    if facts.config.get("bias", "none") != "none":
        yield Finding("refused", "it does not take an adapter's bias")


def vllm_heads(facts: AdapterFacts) -> Iterator[Finding]:
    """From 0.32 on, `modules_to_save` may name a classification head."""
    if others := [name for name in _modules_to_save(facts) if name not in ("classifier", "score")]:
        yield Finding("refused", f"modules_to_save has {_some(others)}")


def vllm_no_modules_to_save(facts: AdapterFacts) -> Iterator[Finding]:
    """Up to 0.31 it had to be empty."""
    if names := _modules_to_save(facts):
        yield Finding("refused", f"modules_to_save has {_some(names)}")


def vllm_names(facts: AdapterFacts) -> Iterator[Finding]:
    """`parse_fine_tuned_lora_name` raises at any tensor but A and B, of layers and of embeddings."""
    saved = {part for name in _modules_to_save(facts) for part in facts.others if f".{name}." in f".{part}"}
    unknown = [n for n in facts.others if not re.search(r"\.lora_embedding_[AB]$|\.base_layer\.", n) and n not in saved]
    if unknown and facts.is_lora and not facts.config.get("use_dora") and not facts.config.get("lora_bias"):
        yield Finding("refused", f"it does not know {_some(unknown)}")


def vllm_rank(facts: AdapterFacts) -> Iterator[Finding]:
    """`MaxLoRARanks` lists the values of ``--max-lora-rank``, of which 16 is the default; a larger rank is refused."""
    rank = facts.largest_rank if facts.is_lora else 1
    largest = max_lora_rank(rank)
    if largest is None:
        yield Finding("refused", f"rank {rank} is more than {VLLM_RANKS[-1]}")
    elif largest > VLLM_DEFAULT_RANK:
        yield Finding("option", f"--max-lora-rank {largest}")


def vllm_ignores_alpha_pattern(facts: AdapterFacts) -> Iterator[Finding]:
    """Up to 0.31 `PEFTHelper.from_dict` drops both patterns: ranks come from the tensors, and one factor is for all.

    Run: its `PEFTHelper` on tiny tensors.
    """
    yield from _scaled(facts, lambda _: facts.alpha / facts.r ** _power(facts))


# --- SGLang 0.5.23: sgl-project/sglang, python/sglang/srt/lora/lora.py, mem_pool.py, lora_manager.py ------------------


def sglang_features(facts: AdapterFacts) -> Iterator[Finding]:
    """`validate_new_adapter` refuses DoRA; `get_normalized_target_modules` takes a list, ``all`` or ``all-linear``."""
    targets = facts.config.get("target_modules")
    if facts.config.get("use_dora"):
        yield Finding("refused", "it does not take DoRA")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield Finding("refused", "target_modules is a regular expression; it takes a list of names")


def sglang_ranks(facts: AdapterFacts) -> Iterator[Finding]:
    """`load_lora_weight_tensor` asserts that every A has the config's `r` rows. Run."""
    other = [module for module, pair in facts.pairs.items() if facts.is_lora and pair.rank != facts.r]
    if other:
        yield Finding("refused", f"its buffers have rank {facts.r}, which {_count(other)} have not")


def sglang_scaling(facts: AdapterFacts) -> Iterator[Finding]:
    """`LoRAAdapter.scaling` is lora_alpha / r for all modules, without `alpha_pattern` and `use_rslora`. Run."""
    yield from _scaled(facts, lambda _: facts.alpha / facts.r)


def sglang_siblings(facts: AdapterFacts) -> Iterator[Finding]:
    """A layer's q, k and v are stacked by q's name, and need v (`normalize_qkv_proj`: KeyError); gate and up are
    stacked by gate's name (`normalize_gate_up_proj`). What is left over has no buffer (`get_target_module_name`:
    ValueError), at the first request. Run: these functions, on all 127 sets of a Llama layer's modules.
    """
    missing = [name for name in missing_siblings(facts.pairs) if facts.is_lora]
    if missing:
        yield Finding("refused", f"{_count(missing)} would be needed beside others of their layers")


def missing_siblings(modules: Collection[str]) -> list[str]:
    """Names of modules that SGLang needs beside `modules`, by the rule above."""
    needed: dict[str, None] = {}
    for module in modules:
        parent, _, kind = module.rpartition(".")
        wanted = {
            "q_proj": ("v_proj",),
            "k_proj": ("q_proj", "v_proj"),
            "v_proj": ("q_proj",),
            "up_proj": ("gate_proj",),
        }
        needed |= dict.fromkeys(f"{parent}.{other}" for other in wanted.get(kind, ()))
    return [name for name in needed if name not in modules]


def sglang_drops(facts: AdapterFacts) -> Iterator[Finding]:
    """`_process_weight` keeps tensors of layers and of embeddings that are targets, and drops others silently."""
    yield from _dropped([name for name in facts.others if facts.is_lora and not facts.config.get("use_dora")])


# --- llama.cpp: ggml-org/llama.cpp, convert_lora_to_gguf.py, src/llama-adapter.h --------------------------------------


def llama_cpp_scaling(facts: AdapterFacts) -> Iterator[Finding]:
    """The file has one alpha, and `llama_adapter_lora_weight::get_scale` divides it by each tensor's rank:
    `alpha_pattern` and `use_rslora` are not read. Run: `make test-servers`.
    """
    yield from _scaled(facts, lambda module: facts.alpha / facts.pairs[module].rank if facts.alpha else 1.0)


def llama_cpp_names(facts: AdapterFacts) -> Iterator[Finding]:
    """The converter's `get_tensors` exits at any tensor that is neither A nor B nor a norm's weight."""
    unknown = [n for n in facts.others if not re.search(r"\.lora_embedding_[AB]$|_layernorm|\.norm", n)]
    if unknown and facts.is_lora:
        yield Finding("refused", f"its converter ends at {_some(unknown)}")
    if norms := [n for n in facts.others if re.search(r"_layernorm|\.norm", n)]:
        # llama_adapter_lora_init_impl: "add support for norm vector" is to do
        yield Finding("wrong", f"does not apply {_some(norms)}")


def llama_cpp_transposed(facts: AdapterFacts) -> Iterator[Finding]:
    """conversion/gpt2.py transposes each weight of a Conv1D, and so swaps A and B, which PEFT does not transpose. Where
    the weight is not square, llama-adapter.cpp refuses the shapes.
    """
    if facts.config.get("fan_in_fan_out") and facts.pairs:
        square = all(pair.d_in == pair.d_out for pair in facts.pairs.values())
        where = "where the base's weights are transposed (fan_in_fan_out)"
        yield Finding("wrong" if square else "refused", f"the converter swaps A and B {where}")


# --- Ollama: ollama/ollama, convert/convert.go, convert/convert_llama_adapter.go --------------------------------------


def ollama_alpha(facts: AdapterFacts) -> Iterator[Finding]:
    """`AdapterParameters.Alpha` is a uint32, which Go's JSON decoder does not read from ``128.0``. Not run."""
    alpha = facts.config.get("lora_alpha")
    if facts.is_lora and (not isinstance(alpha, int) or alpha < 0):
        yield Finding("refused", f"lora_alpha is {alpha!r}; it takes a whole number without a point")


def ollama_architecture(facts: AdapterFacts) -> Iterator[Finding]:
    """`ConvertAdapter` knows Llama (as which Mistral is stored) and Gemma 2."""
    known = ("LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM")
    if facts.architecture is not None and facts.architecture not in known:
        yield Finding("refused", f"it imports no adapters of {facts.architecture:.60}; it takes them as GGUF")


def ollama_names(facts: AdapterFacts) -> Iterator[Finding]:
    """Other tensors are copied into its GGUF, and llama-adapter.cpp refuses their suffix when it loads them."""
    if facts.others and facts.is_lora:
        yield Finding("refused", f"it does not know {_some(facts.others)}")


def ollama_permutation(facts: AdapterFacts) -> Iterator[Finding]:
    """`llamaAdapter.repack` permutes the heads of a query's or key's A. Its base has permuted rows, which are B's:
    llama.cpp's converter permutes B (conversion/llama.py, `LlamaModel.permute`). Not run.
    """
    found = [m for m in facts.pairs if facts.is_lora and m.endswith(("self_attn.q_proj", "self_attn.k_proj"))]
    if found and facts.architecture in (None, "LlamaForCausalLM", "MistralForCausalLM"):
        yield Finding(
            "wrong", f"in {_count(found)} of a Llama: its import permutes A in place of B; it takes them right as GGUF"
        )


def ollama_orientation(facts: AdapterFacts) -> Iterator[Finding]:
    """`llamaAdapter.Tensors` takes an A with more rows than columns, or a B with fewer, for transposed (MLX's are)."""
    found = [m for m, pair in facts.pairs.items() if facts.is_lora and pair.rank > min(pair.d_in, pair.d_out)]
    if found:
        yield Finding("wrong", f"in {_count(found)}, whose rank exceeds a side: it takes A or B for transposed")


# --- TGI and LoRAX: server/text_generation_server/adapters/lora.py, server/lorax_server/adapters/lora.py --------------


def tgi_type(facts: AdapterFacts) -> Iterator[Finding]:
    """`LoraConfig.load` reads r and lora_alpha of the config that stock PEFT builds: AdaLoRA has both."""
    if facts.config["peft_type"] not in ("LORA", "ADALORA"):
        yield Finding("refused", f"peft_type {facts.config['peft_type']} is not LORA")


def tgi_layers(facts: AdapterFacts) -> Iterator[Finding]:
    """`prepare_weights` returns None for a type of module that one layer lacks: the whole type is dropped silently."""
    kinds = _by_kind(facts).values()
    layers = facts.layers or max((number + 1 for found in kinds for number in found), default=0)
    dropped = [module for found in kinds if len(found) < layers for module in found.values()]
    if dropped:
        yield Finding("wrong", f"drops {_count(dropped)}: their type is not in all of {layers} layers")
    elif layers and facts.layers is None:
        yield Finding("note", f"if the base, whose config is not here, has {layers} layer{'s' * (layers > 1)}")


def tgi_stack(facts: AdapterFacts) -> Iterator[Finding]:
    """`LoraWeights` stacks a type's matrices over the layers, padded to 8 or a multiple of 16: `torch.stack` raises."""
    for kind, found in _by_kind(facts).items():
        if len({padded_rank(facts.pairs[module].rank) for module in found.values()}) > 1:
            yield Finding("refused", f"{kind} has different ranks in different layers")
            return


def tgi_scaling(facts: AdapterFacts) -> Iterator[Finding]:
    """Every type is scaled by the config's lora_alpha and r, but `config.r` becomes the first type's padded rank before
    the second is read. With r = 8 or a multiple of 16 on one GPU it stays.
    """
    kinds = sorted(_by_kind(facts), key=lambda kind: _TGI_ORDER.index(kind) if kind in _TGI_ORDER else 99)
    if not kinds:
        return
    first = _by_kind(facts)[kinds[0]]
    padded = padded_rank(facts.pairs[min(first.items())[1]].rank)
    power = _power(facts)

    def scale(module: str) -> float:
        return facts.alpha / (facts.r if module in first.values() else padded) ** power

    yield from _scaled(facts, scale)


def tgi_drops(facts: AdapterFacts) -> Iterator[Finding]:
    """What `map_weights_for_model` does not find by name stays unused, with a warning in the log."""
    yield from _dropped(facts.others)


def tgi_rank(facts: AdapterFacts) -> Iterator[Finding]:
    """`can_vectorize`: larger ranks are computed adapter by adapter, outside of its kernels (layers/lora.py)."""
    if facts.is_lora and facts.largest_rank > SGMV_LARGEST_RANK:
        yield Finding("note", f"slowly: its kernels take ranks up to {SGMV_LARGEST_RANK}")


_TGI_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""models/flash_causal_lm.py: `ADAPTER_LAYERS`"""


def _by_kind(facts: AdapterFacts) -> dict[str, dict[int, str]]:
    """Type of module (q_proj, ...) -> layer -> module; modules outside of layers are left out."""
    found: dict[str, dict[int, str]] = {}
    for module in facts.pairs if facts.is_lora else ():
        name = ModuleName.parse(module)
        if name.number is not None:
            found.setdefault(name.rest.rpartition(".")[2], {})[name.number] = module
    return found


# --- What the rules share --------------------------------------------------------------------------------------------


def _power(facts: AdapterFacts) -> float:
    """The exponent of r in the scaling: 1/2 with rank-stabilised LoRA."""
    return 0.5 if facts.config.get("use_rslora") else 1.0


def _scaled(facts: AdapterFacts, scale: Callable[[str], float]) -> Iterator[Finding]:
    """The modules that a loader scales otherwise than PEFT, with its factor divided by PEFT's."""
    modules = list(facts.pairs) if facts.is_lora else []
    if nothing := [module for module in modules if not facts.scaling(module) and scale(module)]:
        yield Finding("wrong", f"applies {_count(nothing)}, which PEFT scales by 0")
    factors: Mapping[str, float] = {
        module: scale(module) / right for module in modules if (right := facts.scaling(module))
    }
    wrong = {module: factor for module, factor in factors.items() if abs(factor - 1) > 1e-6}
    if wrong:
        least, most = min(wrong.values()), max(wrong.values())
        by = f"factor {least:.2f}" if f"{least:.2f}" == f"{most:.2f}" else f"factors {least:.2f} to {most:.2f}"
        yield Finding("wrong", f"by {by} in {_count(wrong)}")


def _dropped(names: Iterable[str]) -> Iterator[Finding]:
    if found := list(names):
        yield Finding("wrong", f"drops {_some(found)}")


def _modules_to_save(facts: AdapterFacts) -> list[str]:
    names = facts.config.get("modules_to_save") or []
    return [str(name) for name in names] if isinstance(names, list) else [str(names)]


def _count(modules: Collection[str]) -> str:
    """``12 modules (a, b, c, ...)``, or the only one's name."""
    return f"{len(modules)} modules ({_some(modules)})" if len(modules) > 1 else _some(modules)


def _some(names: Collection[str]) -> str:
    return ", ".join([f"{name:.120}" for name in list(names)[:3]] + ["..."] * (len(names) > 3))
