"""Scores of encoder-decoders that write: outputs without padding, and ratios with and without what is passed over."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from helpers.tiny_modes import make_bart, make_t5
from helpers.tiny_run import run_settings
from sparse_llm_ft.adapters import add_adapters, find_targets
from sparse_llm_ft.config import TaskConfig, parse_config
from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.samples import Sample
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tokenization import Seq2SeqPreprocessor
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.objectives.build import build_objective
from sparse_llm_ft.plan import uniform_plan
from sparse_llm_ft.scoring import DerivationSettings, derive
from sparse_llm_ft.scoring.layer_search import LayerSearch
from sparse_llm_ft.training.scorer import Scorer

TASK = resolve_task(TaskConfig(name="custom", path=".", prompt="{text}", completion="{answer}"))
# The longest prompt and the longest completion have equally many words.
PAIRS = [
    ("anna meets tom at the station : red", "tom meets anna"),
    ("a red book", "blue"),
    ("the cake : in the park", "the book in the red station : to anna"),
    ("tom", "a red cake ."),
    ("blue", "gives a cake to anna in the park"),
]


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    (make_t5 if request.param == "t5" else make_bart)(folder)
    return folder


def loud(folder) -> nn.Module:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.4, generator=generator)
    return model.eval().requires_grad_(False)


def samples_of(tokenizer) -> list[Sample]:
    encode = Seq2SeqPreprocessor(tokenizer, 32)
    return [encode(Example(prompt, completion, (completion,))) for prompt, completion in PAIRS]


@torch.no_grad()
def test_outputs_count_the_tokens_of_their_own_stack(folder, data_folder, tmp_path) -> None:
    """Cross-attention's keys and values are as long as the prompt, all else in the decoder as the completion."""
    base, tokenizer = loud(folder), AutoTokenizer.from_pretrained(folder)
    targets = find_targets(base, "all-linear")
    model = add_adapters(base, uniform_plan(targets, 2, 4.0)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=generator)
    samples, objective = samples_of(tokenizer), build_objective(model, tokenizer, TASK)
    expected = dict.fromkeys(targets, 0.0)
    modules = {name: model.get_base_model().get_submodule(name) for name in targets}

    def look(name, module, args, output) -> None:
        expected[name] += float((output - module.base_layer(args[0])).double().square().sum()) / len(samples)

    handles = [
        m.register_forward_hook(lambda m, args, output, name=name: look(name, m, args, output))
        for name, m in modules.items()
    ]
    start = base.config.decoder_start_token_id
    for sample in samples:  # one by one, without padding
        model(
            input_ids=torch.tensor([sample.prompt_ids]),
            decoder_input_ids=torch.tensor([[start, *sample.completion_ids[:-1]]]),
            use_cache=False,
        )
    for handle in handles:
        handle.remove()
    settings = run_settings(folder, data_folder, tmp_path)
    for size in (1, 2, 5):
        settings["evaluation"]["micro_batch_size"] = size
        scorer = Scorer(parse_config(settings), World(0, 1, 0, 1), objective, Console(1))
        assert scorer.lora_output(model, list(targets), samples) == pytest.approx(expected, rel=1e-3)


def test_what_is_passed_over_does_not_change_the_ratios(folder, monkeypatch) -> None:
    model, tokenizer = loud(folder), AutoTokenizer.from_pretrained(folder)
    modules = {name: model.get_submodule(name) for name in find_targets(model, "all-linear")}
    samples, objective = samples_of(tokenizer), build_objective(model, tokenizer, TASK)
    settings = DerivationSettings(
        derivation="single", importance="imp", floor_metric="loss", accuracy_floor=0.99, micro_batch_size=2
    )
    found = derive(model, modules, samples, objective, settings)
    assert found.notes == () and list(found.ratios) == list(modules)
    assert len({share for pair in found.ratios.values() for share in pair}) > 4
    passed = []
    monkeypatch.setattr(LayerSearch, "_pass", lambda self, below, reference: passed.extend(below))
    whole = derive(model, modules, samples, objective, settings)
    assert len(passed) == 3, "all layers of both stacks but the last"
    assert whole.ratios == found.ratios
    own = [model(torch.tensor([s.prompt_ids]), labels=torch.tensor([s.completion_ids])).loss for s in samples]
    total = sum(float(loss) * len(s.completion_ids) for loss, s in zip(own, samples, strict=True))
    assert found.loss == pytest.approx(total / sum(len(s.completion_ids) for s in samples), rel=1e-5)
