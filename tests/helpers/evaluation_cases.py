"""Two-rank cases of generation, losses and labels. See cases.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import get_peft_model
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from helpers.case_tools import (
    MODEL,
    OBJECTIVE,
    PLAIN,
    SAMPLES,
    WORLD,
    base_model,
    case,
    engine_settings,
    make_loop,
    plan_for,
    start_values,
)
from sparse_llm_ft.adapters import SparseLoraConfig
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import EvaluationConfig
from sparse_llm_ft.data.tokenization import Sample
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.evaluation.generation import generate
from sparse_llm_ft.evaluation.loop import mean_loss, predict_labels
from sparse_llm_ft.objectives.language_modeling import LabelWords, Seq2SeqObjective


@case
def generation_is_greedy_decoding_at_stages_2_and_3() -> None:
    """Left padding, batches and ranks change nothing: every text is that of its prompt alone, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    expected = [by_hand(base_model(), sample, tokenizer) for sample in SAMPLES[:5]]
    assert len(set(expected)) > 1
    # Threshold 0: nothing stays whole after its use, not even an omega, and generation is the first to use it.
    gathers = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    others = (EvaluationConfig(max_new_tokens=6, num_beams=3), EvaluationConfig(max_new_tokens=6, temperature=1.0))
    found = []
    for stage, extra in ((2, {}), (3, gathers)):
        model = base_model()
        peft_model = get_peft_model(model, SparseLoraConfig(plan=plan_for(model, train_omega=True)))
        engine = Engine(peft_model, replace(engine_settings(stage, 2), extra=extra))
        for batch_size in (1, 2):
            settings = EvaluationConfig(max_new_tokens=6, micro_batch_size=batch_size)
            texts = generate(engine.module, SAMPLES[:5], tokenizer, settings, WORLD.rank, WORLD.size, stage == 3)
            assert texts == expected, (stage, batch_size, texts, expected)
        found.append(
            [generate(engine.module, SAMPLES[:5], tokenizer, s, WORLD.rank, WORLD.size, stage == 3) for s in others]
        )
        engine.close()
    assert found[0] == found[1]
    assert found[0][1] != expected, "sampling has drawn nothing else than the most probable tokens"


@case
def an_encoder_decoder_trains_and_writes_at_stages_2_and_3() -> None:
    """T5 with shared embeddings: equal losses and texts, one adapter shared by modules of both stacks."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    tokenizer, found = AutoTokenizer.from_pretrained(MODEL), []
    for stage in (0, 2, 3):
        torch.manual_seed(3)
        ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **sizes, **ids))
        plan = plan_for(model.requires_grad_(False))
        peft_model = get_peft_model(model, SparseLoraConfig(plan=plan, task_type="SEQ_2_SEQ_LM"))
        start = start_values(peft_model)
        engine = Engine(peft_model, engine_settings(stage, 2))
        engine.load(start)
        objective = Seq2SeqObjective(0, False, start_token_id=0)
        loop = replace(make_loop(engine, plan, 2, Progress()), objective=objective)
        losses = [step.loss for _, step in zip(range(4), loop.steps(), strict=False)]
        losses.append(mean_loss(engine.module, SAMPLES[:5], objective, 2, WORLD.rank, WORLD.size))
        settings = EvaluationConfig(max_new_tokens=6, micro_batch_size=2)
        place = (WORLD.rank, WORLD.size)
        texts = generate(engine.module, SAMPLES[:5], tokenizer, settings, *place, stage == 3, seq2seq=True)
        found.append((losses, texts))
        engine.close()
    for losses, texts in found[1:]:
        assert max(abs(a - b) for a, b in zip(losses, found[0][0], strict=True)) < 1e-5, (losses, found[0][0])
        assert texts == found[0][1]
    assert found[0][0][0] != found[0][0][3]


@torch.no_grad()
def by_hand(model: torch.nn.Module, sample: Sample, tokenizer) -> str:
    tokens = list(sample.prompt_ids)
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[len(sample.prompt_ids) :], skip_special_tokens=True).strip()


@case
def evaluation_does_not_depend_on_ranks_or_batches() -> None:
    model = base_model()
    alone = mean_loss_alone(model)
    for batch_size in (1, 2, 5):
        shared = mean_loss(model, SAMPLES[:7], OBJECTIVE, batch_size, WORLD.rank, WORLD.size)
        assert abs(shared - alone) < 1e-5


@case
def labels_chosen_do_not_depend_on_ranks_or_batches() -> None:
    """The samples' first completion tokens are the label words; every rank gets all choices, in order."""
    model, samples = base_model(), SAMPLES[:7]
    words = sorted({sample.completion_ids[0] for sample in samples})
    objective = replace(OBJECTIVE, label_words=LabelWords(torch.tensor(words), 0))
    with torch.no_grad():
        logits = [model(torch.tensor([sample.prompt_ids])).logits[0, -1, words] for sample in samples]
    for batch_size in (1, 2, 5):
        loss, choices = predict_labels(model, samples, objective, batch_size, WORLD.rank, WORLD.size)
        assert choices == [int(row.argmax()) for row in logits]
        assert abs(loss - mean_loss_alone(model)) < 1e-5


@torch.no_grad()
def mean_loss_alone(model: torch.nn.Module) -> float:
    losses = [float(PLAIN.loss(model, PLAIN.batch([sample]))) for sample in SAMPLES[:7]]
    return sum(losses) / sum(sample.supervised for sample in SAMPLES[:7])
