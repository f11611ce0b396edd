"""Each rule of the serving contract, by an adapter that breaks it and one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.serving.facts import AdapterFacts, PairShape
from sparse_llm_ft.serving.ranks import max_lora_rank, padded_rank, served_rank
from sparse_llm_ft.serving.servers import SERVERS, find_servers, judge

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
SIDES = {"self_attn.k_proj": (64, 32), "self_attn.v_proj": (64, 32)}
Q0 = "model.layers.0.self_attn.q_proj"


def adapter(kinds: Any = KINDS, layers: int = 2, ranks: Any = None, **config: Any) -> AdapterFacts:
    """A LoRA of rank 8 on every layer; `ranks` has those of single modules."""
    extra = {key: config.pop(key) for key in ("others", "architecture") if key in config}
    count = config.pop("base_layers", 2)
    names = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in kinds]
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": names, **config}
    found = {**dict.fromkeys(names, config["r"]), **(ranks or {})}
    pairs = {n: PairShape(r, *SIDES.get(n.partition(".layers.")[2][2:], (64, 64))) for n, r in found.items()}
    return AdapterFacts(config, pairs, layers=count, **extra)


def verdict(server: str, facts: AdapterFacts) -> str:
    return str(judge(facts, SERVERS[server]))


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("rank", [8, 16, 48])
def test_one_rank_and_lora_alpha_equal_to_it_load_everywhere(server: str, rank: int) -> None:
    """Ollama's own import takes no queries and keys of a Llama."""
    facts = adapter(("self_attn.o_proj", "mlp.up_proj") if server == "ollama" else KINDS, r=rank, lora_alpha=rank)
    option = " with --max-lora-rank 64" if server.startswith("vllm") and rank > 16 else ""
    assert judge(facts, SERVERS[server]).right and verdict(server, facts) == f"loads{option}"


EXPERTS = ("mlp.experts.0.down_proj", "mlp.experts.1.down_proj")
EXPERT = "model.layers.0.mlp.experts.0.down_proj"
SCALING = ("vllm-0.31", "sglang", "llama.cpp", "tgi")
SERVING = tuple(server for server in SERVERS if server != "peft")
UNREAD = "not known: its code was read for CAUSAL_LM, and task_type is "
EVERY_LORA = ("vllm", "vllm-0.31", "sglang", "llama.cpp", "ollama")
CASES: list[tuple[str, AdapterFacts, str]] = [
    # What was not read
    *((server, adapter(task_type="SEQ_2_SEQ_LM"), f"{UNREAD}'SEQ_2_SEQ_LM'") for server in ("vllm", "tgi")),
    *((server, adapter(task_type="SEQ_CLS"), f"{UNREAD}'SEQ_CLS'") for server in SERVING[1:4]),
    ("vllm", adapter(task_type="SEQ_CLS"), "loads"),
    ("peft", adapter(task_type="SEQ_2_SEQ_LM"), "loads"),
    *((server, adapter(EXPERTS), f"not known: no rule here covers 4 modules ({EXPERT}") for server in SERVING),
    ("vllm", adapter(("encoder.q_proj",)), "not known: no rule here covers 2 modules (model.layers.0.encoder.q_proj"),
    # lora_alpha 0
    *((s, adapter(alpha_pattern={Q0: 0}), f"wrong: applies {Q0}, which PEFT scales by 0") for s in SCALING),
    ("vllm", adapter(alpha_pattern={Q0: 0}), "loads"),
    ("llama.cpp", adapter(lora_alpha=0), "wrong: applies 12 modules ("),
    ("vllm-0.31", adapter(lora_alpha=0), "loads"),
    # PEFT
    ("peft", adapter(ranks={Q0: 4}), f"refused: {Q0} has rank 4 and its config says 8"),
    ("peft", adapter(ranks={Q0: 4}, rank_pattern={Q0: 4}), "loads"),
    ("peft", adapter(peft_type="SPARSE_LORA"), "refused: it is of this package's own tuner"),
    # vLLM
    *((server, adapter(peft_type="VERA"), "refused: peft_type VERA is not LORA") for server in EVERY_LORA),
    ("vllm", adapter(use_dora=True), "refused: it does not take DoRA"),
    ("vllm", adapter(lora_bias=True, use_qalora=True), "refused: it does not take lora_bias, QALoRA"),
    ("vllm", adapter(bias="all"), "refused: it does not take an adapter's bias"),
    ("vllm", adapter(init_lora_weights="pissa_niter_4"), "refused: init_lora_weights 'pissa_niter_4' changes"),
    ("vllm", adapter(init_lora_weights="gaussian"), "loads"),
    ("vllm", adapter(modules_to_save=["score"], others=("base_model.model.score.weight",)), "loads"),
    ("vllm-0.31", adapter(modules_to_save=["score"]), "refused: modules_to_save has score"),
    ("vllm", adapter(modules_to_save=["lm_head"]), "refused: modules_to_save has lm_head"),
    ("vllm", adapter(others=("base_model.model.x.trainable_tokens_delta",)), "refused: it does not know base_model"),
    ("vllm", adapter(r=600, lora_alpha=600), "refused: rank 600 is more than 512"),
    ("vllm", adapter(r=33, lora_alpha=33), "loads with --max-lora-rank 64"),
    ("vllm", adapter(ranks={Q0: 100}, rank_pattern={Q0: 100}), "loads with --max-lora-rank 128"),
    ("vllm", adapter(r=16, alpha_pattern={"q_proj": 32}), "loads"),
    ("vllm-0.31", adapter(alpha_pattern={"q_proj": 16}), "wrong by factor 0.50 in 2 modules (model."),
    ("vllm-0.31", adapter(ranks={Q0: 16}, rank_pattern={Q0: 16}, alpha_pattern={Q0: 16}), "loads"),
    ("vllm-0.31", adapter(ranks={Q0: 16}, rank_pattern={Q0: 16}), f"wrong by factor 2.00 in {Q0}"),
    # SGLang
    ("sglang", adapter(use_dora=True), "refused: it does not take DoRA"),
    ("sglang", adapter(target_modules=".*q_proj"), "refused: target_modules is a regular expression"),
    ("sglang", adapter(ranks={Q0: 16}, rank_pattern={Q0: 16}), f"refused: its buffers have rank 8, which {Q0}"),
    ("sglang", adapter(alpha_pattern={Q0: 32}), f"wrong by factor 0.25 in {Q0}"),
    ("sglang", adapter(use_rslora=True), "wrong by factor 0.35 in 12 modules"),
    ("sglang", adapter(kinds=KINDS[:1]), "refused: 2 modules (model.layers.0.self_attn.v_proj"),
    ("sglang", adapter(kinds=KINDS[1:2]), "refused: 4 modules (model.layers.0.self_attn.q_proj"),
    ("sglang", adapter(kinds=KINDS[2:3]), "refused: 2 modules (model.layers.0.self_attn.q_proj"),
    ("sglang", adapter(kinds=(KINDS[0], KINDS[2])), "loads"),
    ("sglang", adapter(kinds=("mlp.up_proj",)), "refused: 2 modules (model.layers.0.mlp.gate_proj"),
    ("sglang", adapter(kinds=("mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj")), "loads"),
    ("sglang", adapter(others=("base_model.model.score.weight",)), "wrong: drops base_model.model.score.weight"),
    # llama.cpp
    ("llama.cpp", adapter(ranks={Q0: 33}, rank_pattern={Q0: 33}, alpha_pattern={Q0: 33}, r=32, lora_alpha=32),
     f"wrong by factor 0.97 in {Q0}"),
    ("llama.cpp", adapter(ranks={Q0: 16}, rank_pattern={Q0: 16}), "loads"),
    ("llama.cpp", adapter(use_rslora=True, r=16, lora_alpha=16), "wrong by factor 0.25 in 12 modules"),
    ("llama.cpp", adapter(others=("base_model.model.score.weight",)), "refused: its converter ends at base_model"),
    ("llama.cpp", adapter(others=("base_model.model.model.norm.weight",)), "wrong: does not apply base_model."),
    ("llama.cpp", adapter(fan_in_fan_out=True), "refused: the converter swaps A and B"),
    ("llama.cpp", adapter(kinds=KINDS[:1], fan_in_fan_out=True), "wrong: the converter swaps A and B"),
    # Ollama
    ("ollama", adapter(lora_alpha=8.0), "refused: lora_alpha is 8.0; it takes a whole number without a point"),
    ("ollama", adapter(architecture="Qwen2ForCausalLM"), "refused: it imports no adapters of Qwen2ForCausalLM"),
    ("ollama", adapter(others=("base_model.model.score.weight",)), "refused: it does not know base_model"),
    ("ollama", adapter(), "wrong in 4 modules (model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj"),
    ("ollama", adapter(architecture="Gemma2ForCausalLM"), "loads"),
    ("ollama", adapter(kinds=KINDS[2:3], r=48, lora_alpha=48), "wrong in 2 modules (model.layers.0.self_attn.v_proj"),
    # TGI and LoRAX
    ("tgi", adapter(peft_type="VERA"), "refused: peft_type VERA is not LORA"),
    ("tgi", adapter(layers=1), "wrong: drops 6 modules (model.layers.0.self_attn.q_proj"),
    ("tgi", adapter(kinds=KINDS[:1], base_layers=None), "loads, if the base, whose config is not here, has 2 layers"),
    ("tgi", adapter(ranks={Q0: 17}, rank_pattern={Q0: 17}), "refused: q_proj has different ranks in different layers"),
    ("tgi", adapter(r=12, lora_alpha=12), "wrong by factor 0.75 in 10 modules (model.layers.0.self_attn.k_proj"),
    ("tgi", adapter(r=12, lora_alpha=12, kinds=KINDS[:1]), "loads"),
    ("tgi", adapter(use_rslora=True), "loads"),
    ("tgi", adapter(layers=1, alpha_pattern={Q0: 16}), f"wrong by factor 0.50 in {Q0}; drops 6 modules ("),
    ("tgi", adapter(alpha_pattern={Q0: 16}), f"wrong by factor 0.50 in {Q0}"),
    ("tgi", adapter(others=("base_model.model.score.weight",)), "wrong: drops base_model.model.score.weight"),
    ("tgi", adapter(r=256, lora_alpha=256), "loads, slowly: its kernels take ranks up to 128"),
]  # fmt: skip


@pytest.mark.parametrize(("server", "facts", "expected"), CASES)
def test_a_rule_gives_its_verdict(server: str, facts: AdapterFacts, expected: str) -> None:
    text = verdict(server, facts)
    assert text.startswith(expected) if not expected.startswith("loads") else text == expected
    assert judge(facts, SERVERS[server]).right == expected.startswith("loads")


def test_every_rule_has_a_case() -> None:
    """Each rule of each server finds something in an adapter above."""
    for server in SERVERS.values():
        cases = [facts for name, facts, _ in CASES if name == server.name]
        others = [facts for _, facts, _ in CASES]
        for rule in server.rules:
            assert any(list(rule(facts)) for facts in (*cases, *others)), (server.name, rule.__name__)


def test_the_scaling_is_that_of_peft() -> None:
    """`get_pattern_key`: a key matches at the end of a name, from a dot on, and the first match counts."""
    facts = adapter(rank_pattern={"q_proj": 4, Q0: 2}, alpha_pattern={r"layers\.1\..*": 6}, lora_alpha=4)
    assert (facts.rank(Q0), facts.rank("model.layers.0.x_q_proj")) == (4, 8)
    assert facts.scaling(Q0) == 1.0 and facts.scaling("model.layers.1.mlp.up_proj") == 6 / 8
    assert adapter(use_rslora=True, r=16, lora_alpha=8).scaling(Q0) == 2.0


def test_ranks_are_those_that_no_server_pads() -> None:
    assert [served_rank(r) for r in (1, 8, 9, 16, 17, 33, 510)] == [8, 8, 16, 16, 32, 48, 512]
    assert [max_lora_rank(r) for r in (1, 2, 48, 257, 512, 513)] == [1, 8, 64, 320, 512, None]
    # lorax, pad_to_min_rank: at or below 8 per GPU that, else the next multiple of 16.
    assert [padded_rank(r) for r in (1, 8, 9, 16, 33)] == [8, 8, 16, 16, 48]
    assert [padded_rank(r, gpus=2) for r in (1, 8, 16, 17)] == [16, 16, 16, 32]


def test_an_unknown_server_is_one_line() -> None:
    assert [server.name for server in find_servers("tgi,vllm,tgi")] == ["tgi", "vllm"]
    with pytest.raises(UserError, match=r"^--for triton: expected peft, vllm, vllm-0.31, sglang, "):
        find_servers("vllm,triton")
