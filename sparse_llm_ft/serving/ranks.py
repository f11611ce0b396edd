"""Ranks that servers take."""

from __future__ import annotations

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank`` (vllm-project/vllm, vllm/config/lora.py, `MaxLoRARanks`)."""

VLLM_DEFAULT_RANK = 16
"""Its default there."""

LARGEST_RANK = VLLM_RANKS[-1]
"""The largest rank that every server with a limit takes; PEFT, SGLang and llama.cpp have none."""

SGMV_RANK, SGMV_BLOCK, SGMV_LARGEST_RANK = 8, 16, 128
"""TGI and LoRAX pad ranks to 8 per GPU or to a multiple of 16, and their kernels take ranks up to 128 per GPU
(predibase/lorax, server/lorax_server/utils/sgmv.py: `MIN_SGMV_RANK`, `SGMV_BLOCK_SIZE`, `MAX_RANK_CUSTOM`)."""


def served_rank(rank: int) -> int:
    """The least rank that no server pads: 8, or a multiple of 16.

    Args:
        rank: what the adapters need, at least 1.
    """
    return SGMV_RANK if rank <= SGMV_RANK else -(-rank // SGMV_BLOCK) * SGMV_BLOCK


def padded_rank(rank: int, gpus: int = 1) -> int:
    """The rank to which TGI and LoRAX pad (`pad_to_min_rank` of the file above)."""
    return max(SGMV_RANK * gpus, served_rank(rank)) if rank <= SGMV_RANK * gpus else served_rank(rank)


def max_lora_rank(rank: int) -> int | None:
    """The least value of vLLM's ``--max-lora-rank`` for adapters of this rank; None if none is large enough."""
    return next((largest for largest in VLLM_RANKS if rank <= largest), None)
