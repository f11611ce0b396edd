"""Losses of encoder-decoders and of regressions against transformers' own; a decoder's head whatever the padding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    MBartConfig,
    T5Config,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from helpers.tiny_modes import make_bart, make_t5
from sparse_llm_ft.config import EvaluationConfig, ModelConfig, TaskConfig
from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.data.tokenization import ClassificationPreprocessor, Seq2SeqPreprocessor
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.evaluation.generation import rank_tokens
from sparse_llm_ft.evaluation.loop import predict_labels
from sparse_llm_ft.model.architecture import decoder_start_token
from sparse_llm_ft.model.loading import load_model, load_tokenizer
from sparse_llm_ft.objectives.build import build_objective
from sparse_llm_ft.objectives.classification import ClassificationObjective, RegressionObjective
from sparse_llm_ft.objectives.language_modeling import Seq2SeqObjective

WRITTEN = resolve_task(TaskConfig(name="custom", path=".", prompt="{text}", completion="{answer}"))
PAIRS = [
    ("anna meets tom at the station", "tom meets anna"),
    ("a red book", "blue"),
    ("the cake : in the park", "the book in the red station : to anna"),
    ("tom", "a red cake ."),
]


def loud(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.4, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["t5", "bart"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Model and tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    (make_t5 if request.param == "t5" else make_bart)(folder)
    return loud(AutoModelForSeq2SeqLM.from_pretrained(folder)), AutoTokenizer.from_pretrained(folder)


def samples_of(tokenizer) -> list[Sample]:
    encode = Seq2SeqPreprocessor(tokenizer, 32)
    return [encode(Example(prompt, completion, (completion,))) for prompt, completion in PAIRS]


def own_loss(model: nn.Module, sample: Sample) -> float:
    """transformers' mean over the tokens, of a sample without padding, whose decoder inputs it makes itself."""
    labels = torch.tensor([sample.completion_ids])
    return float(model(input_ids=torch.tensor([sample.prompt_ids]), labels=labels).loss) * labels.numel()


def test_a_completions_loss_is_the_models_own_whatever_the_batch(writer) -> None:
    model, tokenizer = writer
    samples = samples_of(tokenizer)
    objective = build_objective(model, tokenizer, WRITTEN)
    assert type(objective) is Seq2SeqObjective
    expected = [own_loss(model, sample) for sample in samples]
    assert max(expected) > 2 * min(expected)
    for order in ([0, 1, 2, 3], [3, 1], [2]):
        batch = objective.batch([samples[i] for i in order])
        assert objective.losses(model, batch).tolist() == pytest.approx([expected[i] for i in order], rel=1e-5)
        assert float(objective.loss(model, batch)) == pytest.approx(sum(expected[i] for i in order), rel=1e-5)
    assert objective.loss(model, batch).dtype == torch.float32
    assert [objective.units(sample) for sample in samples] == [len(sample.completion_ids) for sample in samples]


def test_what_the_decoder_sees_is_the_models_own_shift(writer) -> None:
    model, tokenizer = writer
    batch = build_objective(model, tokenizer, WRITTEN).batch(samples_of(tokenizer))
    inside = batch["decoder_attention_mask"].bool()
    expected = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert torch.equal(batch["decoder_input_ids"][inside], expected[inside])
    assert torch.equal(inside, batch["labels"] != -100)
    assert batch["decoder_input_ids"][:, 0].tolist() == [model.config.decoder_start_token_id] * 4
    assert batch["input_ids"].shape[1] != batch["labels"].shape[1]


def t5gemma(folder: Path) -> nn.Module:
    """A random T5Gemma (2 and 2 layers of width 16); its config names no first token of the decoder."""
    make_t5(folder)
    count = len(AutoTokenizer.from_pretrained(folder))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": count}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    stack = sizes | heads | tokens
    return loud(T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=stack, decoder=stack, vocab_size=count)))


def test_a_decoder_whose_config_names_no_first_token_learns_and_writes_behind_the_same_one(tmp_path: Path) -> None:
    model, tokenizer = t5gemma(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    samples = samples_of(tokenizer)
    objective = build_objective(model, tokenizer, WRITTEN)
    expected = [own_loss(model, sample) for sample in samples]
    assert objective.losses(model, objective.batch(samples)).tolist() == pytest.approx(expected, rel=1e-5)
    settings = EvaluationConfig(max_new_tokens=1)
    written = rank_tokens(model, samples, tokenizer, settings, 0, 1, synced=False, seed=0, seq2seq=True)
    for tokens, sample in zip(written.tolist(), samples, strict=True):
        logits = model(torch.tensor([sample.prompt_ids]), decoder_input_ids=torch.tensor([[1]])).logits[0, -1]
        chosen = int(logits.argmax())
        assert tokens == [0 if chosen == tokenizer.eos_token_id else chosen + 1]
    fresh = T5Config()
    assert not hasattr(fresh, "decoder_start_token_id") and decoder_start_token(fresh, 7) == 7
    assert decoder_start_token(MBartConfig(), 7) == MBartConfig().bos_token_id == 0


def test_prompt_and_completion_have_their_special_tokens(writer) -> None:
    model, tokenizer = writer
    sample = samples_of(tokenizer)[0]
    words = tokenizer.convert_ids_to_tokens
    begin = ["<s>"] if model.config.model_type == "bart" else []
    assert words(list(sample.prompt_ids)) == [*begin, *PAIRS[0][0].split(), "</s>"]
    assert words(list(sample.completion_ids)) == [*begin, *PAIRS[0][1].split(), "</s>"]


def next_tokens(model: nn.Module, sample: Sample) -> torch.Tensor:
    """(completion, V) log-probabilities, of a sample alone."""
    before = torch.tensor([[model.config.decoder_start_token_id, *sample.completion_ids[:-1]]])
    return model(torch.tensor([sample.prompt_ids]), decoder_input_ids=before).logits[0].log_softmax(-1)


def test_right_tokens_are_counted_given_all_before(writer) -> None:
    model, tokenizer = writer
    objective = build_objective(model, tokenizer, WRITTEN)
    samples = samples_of(tokenizer)
    for i in (0, 2):  # some are right
        first = int(next_tokens(model, samples[i])[0].argmax())
        samples[i] = replace(samples[i], completion_ids=(first, *samples[i].completion_ids[1:]))
    expected = [
        int((next_tokens(model, sample).argmax(-1) == torch.tensor(sample.completion_ids)).sum()) for sample in samples
    ]
    assert len(set(expected)) > 1
    assert objective.correct(model, objective.batch(samples)).tolist() == expected


def labelled(*words: str, **settings: object) -> Task:
    return resolve_task(TaskConfig(name="custom", path=".", prompt="{text} ?", labels=words, **settings))


def test_a_label_is_chosen_where_the_words_differ_behind_the_token_that_texts_begin_with(writer) -> None:
    model, tokenizer = writer
    words = ("red", "blue cake", "station")
    objective = build_objective(model, tokenizer, labelled(*words))
    begin = int(model.config.model_type == "bart")
    assert objective.label_words.position == begin
    assert tokenizer.convert_ids_to_tokens(objective.label_words.tokens.tolist()) == ["red", "blue", "station"]
    encode = Seq2SeqPreprocessor(tokenizer, 32)
    prompts = [" ".join([a, b, c]) for a in ("anna", "tom") for b in ("buys", "meets") for c in ("a", "the", "cake")]
    samples = [encode(Example(prompt, words[i % 3], (), label=i % 3)) for i, prompt in enumerate(prompts)]
    tokens = objective.label_words.tokens
    expected = [int(next_tokens(model, sample)[begin, tokens].argmax()) for sample in samples]
    assert len(set(expected)) > 1
    batch = objective.batch(samples)
    losses, chosen = objective.losses_and_predictions(model, batch)
    assert chosen.tolist() == expected
    assert losses.tolist() == pytest.approx([own_loss(model, sample) for sample in samples], rel=1e-5)
    assert objective.correct(model, batch).tolist() == [int(c == i % 3) for i, c in enumerate(expected)]
    assert objective.majority(samples) == pytest.approx(1 / 3) and objective.scored(samples[0]) == 1
    loss, again = predict_labels(model, samples, objective, 5, 0, 1)
    assert again == expected and loss == pytest.approx(
        float(losses.sum()) / sum(len(sample.completion_ids) for sample in samples), rel=1e-6
    )


def test_label_words_with_the_same_token_are_refused(writer) -> None:
    with pytest.raises(ConfigError, match=r"task.labels: 'red cake' and 'red book' both continue with the token 'red'"):
        build_objective(*writer, labelled("blue", "red cake", "red book"))


SCORED = [
    TextSample((2, 5, 6, 7, 3), (0,) * 5, 1.5),
    TextSample((2, 9, 3, 8, 8, 3), (0, 0, 0, 1, 1, 1), 4.0),
    TextSample((2, 4, 3), (0,) * 3, 0.0),
]


def test_a_regressions_loss_is_transformers_mean_squared_error(encoder_folder: Path) -> None:
    model = loud(AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=1))
    model.config.problem_type = "regression"
    objective = RegressionObjective(0)
    alone = [
        model(torch.tensor([s.ids]), token_type_ids=torch.tensor([s.type_ids]), labels=torch.tensor([s.label]))
        for s in SCORED
    ]
    batch = objective.batch(SCORED)
    assert batch["labels"].dtype == torch.float32
    assert objective.losses(model, batch).tolist() == pytest.approx([float(o.loss) for o in alone], rel=1e-4)
    assert float(objective.loss(model, batch)) == pytest.approx(3 * float(model(**batch).loss), rel=1e-5)
    losses, outputs = objective.losses_and_predictions(model, batch)
    assert outputs.tolist() == pytest.approx([float(o.logits) for o in alone], rel=1e-4)
    assert torch.equal(losses, objective.losses(model, batch))


def test_a_score_is_right_within_a_quarter(encoder_folder: Path) -> None:
    model = loud(AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=1))
    objective = RegressionObjective(0)
    outputs = objective.losses_and_predictions(model, objective.batch(SCORED))[1].tolist()
    near = [replace(s, label=o + d) for s, o, d in zip(SCORED, outputs, (0.24, -0.26, 0.0), strict=True)]
    assert objective.correct(model, objective.batch(near)).tolist() == [1, 0, 1]
    assert objective.majority([replace(SCORED[0], label=x) for x in (1.0, 1.2, 0.9, 3.0)]) == 0.75


def test_the_objective_of_a_head_follows_from_the_task(encoder_folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    scored = resolve_task(TaskConfig(name="custom", path=".", prompt="{text}", score=(0.0, 5.0)))
    assert type(build_objective(model, tokenizer, scored)) is RegressionObjective
    assert type(build_objective(model, tokenizer, labelled("no", "yes"))) is ClassificationObjective


@pytest.fixture
def unpadded_folder(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny Llama with neither a padding token nor a model that knows one."""
    shutil.copytree(model_folder, tmp_path / "unpadded")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "unpadded")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "unpadded").model
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "unpadded")
    return tmp_path / "unpadded"


@pytest.mark.parametrize("folder", ["model_folder", "unpadded_folder"])
def test_a_decoders_head_reads_the_last_token_whatever_the_padding(folder: str, request, process_group) -> None:
    config, task_mode = (
        ModelConfig(name=str(request.getfixturevalue(folder)), dtype="float32"),
        TaskMode("sequence_classification", 3),
    )
    tokenizer, model = load_tokenizer(config, task_mode), loud(load_model(config, task_mode))
    assert tokenizer.pad_token == ("</s>" if folder == "unpadded_folder" else "<pad>")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    encode = ClassificationPreprocessor(tokenizer, 32)
    texts = [("anna meets tom at the station",), ("a red book",), ("tom", "gives a cake"), ("in",)]
    samples = [encode(Example("", "", (), label=i % 3, texts=pair)) for i, pair in enumerate(texts)]
    expected = []
    for sample in samples:
        states = model.model(torch.tensor([sample.ids])).last_hidden_state[0]
        expected.append(float(F.cross_entropy(model.score(states[-1]), torch.tensor(sample.label))))
    objective = build_objective(model, tokenizer, labelled("no", "yes", "perhaps"))
    assert type(objective) is ClassificationObjective
    for order in ([0, 1, 2, 3], [1, 3], [3]):
        batch = objective.batch([samples[i] for i in order])
        assert objective.losses(model, batch).tolist() == pytest.approx([expected[i] for i in order], rel=1e-4)


def test_a_pair_for_a_decoder_is_joined_by_a_line_break(model_folder: Path) -> None:
    class Seen:
        """A tokenizer that remembers its texts."""

        def __init__(self, tokenizer) -> None:
            self.tokenizer, self.texts = tokenizer, None

        def __call__(self, *texts: str, **options: object):
            self.texts = texts
            return self.tokenizer(*texts, **options)

        def __getattr__(self, name: str):
            return getattr(self.tokenizer, name)

    tokenizer = Seen(AutoTokenizer.from_pretrained(model_folder))
    ClassificationPreprocessor(tokenizer, 32)(Example("", "", (), label=0, texts=("tom meets", "a cake")))
    assert tokenizer.texts == ("tom meets\na cake",)
