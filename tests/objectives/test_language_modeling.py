"""Losses and right answers against direct computations: one sample at a time, without batch or padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.objectives.build import build_objective
from sparse_llm_ft.objectives.classification import ClassificationObjective
from sparse_llm_ft.objectives.language_modeling import CompletionObjective, LabelWords

SAMPLES = [Sample((1, 5, 6, 7), (8, 9, 2)), Sample((1, 4), (11, 2)), Sample((1, 12, 3), (5, 5, 5, 2))]
WORDS = (8, 11, 5)
"""The first tokens of the completions above."""
TEXTS = [
    TextSample((2, 5, 6, 7, 3), (0,) * 5, 0),
    TextSample((2, 9, 3, 8, 8, 3), (0, 0, 0, 1, 1, 1), 2),
    TextSample((2, 4, 3), (0,) * 3, 2),
    TextSample((2, 10, 11, 3), (0,) * 4, 1),
]


def by_hand(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """(completion, V) log-probabilities of each completion token given all before it."""
    ids = [*sample.prompt_ids, *sample.completion_ids]
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]


def negative_log_likelihood(model: torch.nn.Module, sample: Sample) -> float:
    return -sum(float(row[token]) for row, token in zip(by_hand(model, sample), sample.completion_ids, strict=True))


@pytest.mark.parametrize("keeps_logits", [True, False])
@pytest.mark.parametrize("label_words", [None, LabelWords(torch.tensor(WORDS), 0)])
def test_a_completions_loss_is_the_sum_over_its_tokens(causal, keeps_logits: bool, label_words) -> None:
    objective = CompletionObjective(0, keeps_logits, label_words)
    batch, expected = objective.batch(SAMPLES), [negative_log_likelihood(causal, sample) for sample in SAMPLES]
    assert objective.losses(causal, batch).tolist() == pytest.approx(expected, rel=1e-5)
    assert float(objective.loss(causal, batch)) == pytest.approx(sum(expected), rel=1e-5)
    assert objective.loss(causal, batch).dtype == torch.float32
    assert [objective.units(sample) for sample in SAMPLES] == [3, 2, 4]
    assert [objective.tokens(sample) for sample in SAMPLES] == [7, 4, 7]


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_right_tokens_of_a_completion_are_counted_teacher_forced(causal, keeps_logits: bool) -> None:
    predicted = [by_hand(causal, sample).argmax(-1).tolist() for sample in SAMPLES]
    samples = [Sample(s.prompt_ids, (*p[:-1], 2)) for s, p in zip(SAMPLES, predicted, strict=True)] + SAMPLES
    objective = CompletionObjective(0, keeps_logits)
    expected = [
        sum(int(a) == b for a, b in zip(by_hand(causal, s).argmax(-1), s.completion_ids, strict=True)) for s in samples
    ]
    assert objective.correct(causal, objective.batch(samples)).tolist() == expected
    assert len(set(expected)) > 1
    assert [objective.scored(sample) for sample in SAMPLES] == [3, 2, 4]


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_a_label_is_chosen_by_the_first_token_of_its_word(causal, keeps_logits: bool) -> None:
    prompts = [(1, *range(3, 3 + n)) for n in range(1, 9)]
    samples = [Sample(prompt, (WORDS[i % 3], 4, 2)[: 2 + i % 2]) for i, prompt in enumerate(prompts)]
    objective = CompletionObjective(0, keeps_logits, LabelWords(torch.tensor(WORDS), 0))
    expected = [max(range(3), key=lambda k: by_hand(causal, s)[0, WORDS[k]]) for s in samples]
    assert len(set(expected)) > 1
    batch = objective.batch(samples)
    losses, choices = objective.losses_and_predictions(causal, batch)
    assert choices.tolist() == expected
    assert objective.correct(causal, batch).tolist() == [int(c == i % 3) for i, c in enumerate(expected)]
    assert torch.equal(losses, objective.losses(causal, batch))
    assert [objective.scored(sample) for sample in samples] == [1] * 8


def test_a_heads_loss_is_the_sum_over_samples(encoder) -> None:
    objective = ClassificationObjective(pad_token_id=0)
    rows = [
        encoder(torch.tensor([s.ids]), token_type_ids=torch.tensor([s.type_ids])).logits[0].log_softmax(-1)
        for s in TEXTS
    ]
    expected = [-float(row[sample.label]) for row, sample in zip(rows, TEXTS, strict=True)]
    batch = objective.batch(TEXTS)
    assert objective.losses(encoder, batch).tolist() == pytest.approx(expected, rel=1e-5)
    assert float(objective.loss(encoder, batch)) == pytest.approx(sum(expected), rel=1e-5)
    assert float(objective.loss(encoder, batch)) == pytest.approx(4 * float(encoder(**batch).loss), rel=1e-5)
    choices = [int(row.argmax()) for row in rows]
    assert len(set(choices)) > 1
    assert objective.losses_and_predictions(encoder, batch)[1].tolist() == choices
    assert objective.correct(encoder, batch).tolist() == [
        int(c == s.label) for c, s in zip(choices, TEXTS, strict=True)
    ]
    assert [(objective.units(s), objective.scored(s), objective.tokens(s)) for s in TEXTS] == [
        (1, 1, 5), (1, 1, 6), (1, 1, 3), (1, 1, 4)
    ]  # fmt: skip


def test_a_repeated_batch_gives_repeated_values(causal, encoder) -> None:
    for model, objective, samples in (
        (causal, CompletionObjective(0, True), SAMPLES),
        (causal, CompletionObjective(0, True, LabelWords(torch.tensor(WORDS), 0)), SAMPLES),
        (encoder, ClassificationObjective(0), TEXTS),
    ):
        batch = objective.batch(samples)
        assert all(len(tensor) == len(samples) for tensor in batch.values())
        twice = {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
        assert objective.correct(model, twice).tolist() == objective.correct(model, batch).tolist() * 2
        expected = objective.losses(model, batch).repeat(2)
        torch.testing.assert_close(objective.losses(model, twice), expected)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_model_under_peft_gives_the_bare_models_loss(encoder_folder: Path, task_type: str | None) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=3)
    model.eval().requires_grad_(False)
    tokenizer, task = AutoTokenizer.from_pretrained(encoder_folder), labelled("anna", "tom", "red")
    objective = build_objective(model, tokenizer, task)
    bare = float(objective.loss(model, objective.batch(TEXTS)))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query"], task_type=task_type)).eval()
    assert type(build_objective(wrapped, tokenizer, task)) is ClassificationObjective
    assert float(objective.loss(wrapped, objective.batch(TEXTS)).detach()) == pytest.approx(bare, rel=1e-6)


def labelled(*labels: str, **settings: object):
    return resolve_task(TaskConfig(name="custom", path=".", prompt="{text} ?", labels=labels, **settings))


def test_the_objective_follows_from_model_and_task(causal, encoder, model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    objective = build_objective(causal, tokenizer, labelled("red", "blue cake", "book"))
    assert isinstance(objective, CompletionObjective) and objective.keeps_logits and objective.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(objective.label_words.tokens) == ["red", "blue", "book"]
    assert build_objective(causal, tokenizer, replace(labelled("red", "blue"), labels=None)).label_words is None
    assert isinstance(build_objective(encoder, tokenizer, labelled("red", "red cake")), ClassificationObjective)


def test_label_words_with_the_same_first_token_are_refused(causal, model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with pytest.raises(ConfigError, match=r"task.labels: 'red cake' and 'red book' both continue with the token 'red'"):
        build_objective(causal, tokenizer, labelled("blue", "red cake", "red book"))
    with pytest.raises(ConfigError, match=r"task.labels: 'dog' and 'cat' both continue with the token '<unk>'"):
        build_objective(causal, tokenizer, labelled("dog", "cat"))


def test_label_words_may_have_the_same_beginning(causal, model_folder: Path) -> None:
    """Told by the second token, of a completion that begins with "a", as one told by the first without it."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    objective = build_objective(causal, tokenizer, labelled("blue", "in", completion="a {label}"))
    assert objective.label_words.position == 1
    first = build_objective(causal, tokenizer, labelled("blue", "in"))
    assert objective.label_words.tokens.tolist() == first.label_words.tokens.tolist()
    a, blue = tokenizer("a blue", add_special_tokens=False)["input_ids"]
    prompts = [(1, *range(3, 3 + n)) for n in range(1, 9)]
    long, short = ([Sample(p, c) for p in prompts] for c in ((a, blue, 2), (blue, 2)))
    short = [Sample((*s.prompt_ids, a), s.completion_ids) for s in short]
    chosen = objective.losses_and_predictions(causal, objective.batch(long))[1].tolist()
    assert len(set(chosen)) == 2
    assert chosen == first.losses_and_predictions(causal, first.batch(short))[1].tolist()


def test_the_majority_is_the_largest_class_or_the_most_frequent_token() -> None:
    assert ClassificationObjective(0).majority(TEXTS) == 0.5
    assert CompletionObjective(0, True).majority(SAMPLES) == pytest.approx(3 / 9)
    samples = [replace(sample, label=label) for sample, label in zip(SAMPLES, (1, 0, 1), strict=True)]
    assert CompletionObjective(0, True, torch.tensor([3, 4])).majority(samples) == pytest.approx(2 / 3)
