"""LayerDrop would let each rank reduce the gradients of other layers."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, M2M100Config, M2M100ForConditionalGeneration

from sparse_llm_ft.model.layers import keep_all_layers


def test_every_layer_runs_in_every_training_step() -> None:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = M2M100Config(
        vocab_size=40, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes,
        encoder_layerdrop=0.99, decoder_layerdrop=0.99, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    model = M2M100ForConditionalGeneration(config).train()
    inputs = {"input_ids": torch.tensor([[5, 6, 2]]), "decoder_input_ids": torch.tensor([[2, 7, 8]])}
    assert keep_all_layers(model) and not keep_all_layers(model)
    model(**inputs).logits.sum().backward()
    layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    assert all(layer.fc1.weight.grad is not None for layer in layers)


def test_a_model_without_it_stays_as_it_is() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert not keep_all_layers(LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)))
