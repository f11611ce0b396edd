"""Below stage 3 each rank maps the base's files; the node's page cache reads them from the file system once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("shared_pages.py")
PAGE = 4096


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_ranks_read_what_one_reads(quantization: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(base, max_shard_size="9MB")
    files = sorted(base.glob("*.safetensors"))
    assert len(files) > 1
    script = {"script": str(SCRIPT), "arguments": [str(base), quantization, str(tmp_path / "read")]}
    statuses = run_worlds({"pages": {"trees": script, "world_size": 2}}, tmp_path / "logs")
    assert statuses["pages"] == [0, 0], last_lines(tmp_path / "logs" / "pages")
    first, second = (json.loads((tmp_path / f"read-{rank}").read_text()) for rank in (0, 1))
    if not first["alone"]:
        pytest.skip(f"{tmp_path} is on no disk: its reads are not counted")
    pages = sum(-(-file.stat().st_size // PAGE) * PAGE for file in files)
    # The kernel may keep a few pages that it was told to drop, and drop some that it was to keep, which are
    # then read again. If both ranks read everything, it would count twice.
    assert 0.9 * pages < first["alone"] < 1.1 * pages
    assert 0.9 * pages < first["together"] + second["together"] < 1.1 * pages
    assert max(first["cached"], second["cached"]) < 0.1 * pages
