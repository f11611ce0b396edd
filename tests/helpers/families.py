"""The files of configs/ as trees of settings, and its model families: at published sizes, and tiny with weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sparse_llm_ft.config import RunConfig, merge, parse_config
from sparse_llm_ft.io.strict_json_yaml import read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = ("models", "tasks", "methods", "deepspeed")
"""In the order in which they are layered."""

Tree = Mapping[str, Any]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "LlamaConfig",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "llama-3-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
    "mistral-7b": (
        "MistralConfig",
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": None,
        },
    ),
    "qwen2.5-7b": (
        "Qwen2Config",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
        },
    ),
}
"""Class of the architecture's settings and what the published config.json has, of what sizes depend on."""

_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deberta-v3-base": (
        "DebertaV2Config",
        {
            **_BASE,
            "vocab_size": 128100,
            "max_position_embeddings": 512,
            "type_vocab_size": 0,
            "position_biased_input": False,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 256,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "roberta-base": (
        "RobertaConfig",
        {**_BASE, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "bart-large": (
        "BartConfig",
        {
            "vocab_size": 50265,
            "d_model": 1024,
            "encoder_layers": 12,
            "decoder_layers": 12,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "encoder_ffn_dim": 4096,
            "decoder_ffn_dim": 4096,
        },
    ),
}
"""The same of the encoders and the encoder-decoder."""


@cache
def files(kind: str) -> dict[str, Tree]:
    """Every file of one kind, by its path without ending: ``glue/cola``."""
    folder = CONFIGS / kind
    paths = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): read_yaml(path) for path in paths}


def layered(*trees: Tree) -> dict[str, Any]:
    """The trees merged, later ones winning, as the command line merges files."""
    merged: dict[str, Any] = {"output_dir": "runs/x"}
    for tree in trees:
        merged = merge(merged, tree)
    return merged


def family(model: str) -> str:
    """The family of a file of configs/models."""
    return model.removesuffix("-nf4")


def settings(name: str, **changes: Any) -> Any:
    """The family's settings as transformers has them."""
    import transformers

    kind, sizes = (FAMILIES | SMALL_MODELS)[name]
    return getattr(transformers, kind)(**(sizes | changes))


def make_tiny(name: str, folder: Path, **changes: Any) -> None:
    """A random model of the family, 2 layers of width 32, with its ratio of query to key heads and a tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from helpers.tiny_files import make_model

    make_model(folder)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    sizes = FAMILIES[name][1]
    grouped = sizes["num_key_value_heads"] < sizes["num_attention_heads"]
    tiny = settings(
        name,
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1 if grouped else 4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny).save_pretrained(folder)


def parsed(*trees: Tree) -> RunConfig:
    """The layered trees, checked."""
    return parse_config(layered(*trees))
