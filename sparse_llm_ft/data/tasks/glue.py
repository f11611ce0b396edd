"""Tasks of GLUE (Wang et al., 2019). Its test splits have no labels, so ``test`` is the validation split.

Label words are in the order of the hub's integers.
"""

from __future__ import annotations

from functools import partial

from sparse_llm_ft.data.tasks.task import Task

_PAIR = {"sentence1": "Ida locked the door .", "sentence2": "The door was locked by Ida ."}
_glue = partial(
    Task,
    hub_id="nyu-mll/glue",
    completion=" {label}",
    splits={"train": "train", "validation": "validation", "test": "validation"},
    metrics=("accuracy",),
)

_SMALL, _LARGE = 0.02, 0.05
"""Shares of the smaller and of the larger data sets from which Partial-LoRA (section 5) derives ratios."""

TASKS = (
    _glue(
        name="glue/cola",
        hub_config="cola",
        few_shot_fraction=_SMALL,
        prompt="Is this sentence grammatical?\n\n{sentence}\n\nAnswer:",
        labels=("no", "yes"),
        texts=("sentence",),
        metrics=("matthews",),  # most sentences are grammatical
        description="whether a sentence is grammatical",
        source="CoLA, Warstadt et al., 2019",
        example={"sentence": "Ida the door locked has .", "label": 0, "idx": 0},
    ),
    _glue(
        name="glue/sst2",
        hub_config="sst2",
        few_shot_fraction=_LARGE,
        prompt="What is the sentiment of the review?\n\n{sentence}\n\nSentiment:",
        labels=("negative", "positive"),
        texts=("sentence",),
        description="the sentiment of a sentence from a film review",
        source="SST-2, Socher et al., 2013",
        example={"sentence": "two hours that i would gladly spend again", "label": 1, "idx": 0},
    ),
    _glue(
        name="glue/mrpc",
        hub_config="mrpc",
        few_shot_fraction=_SMALL,
        prompt="Do both sentences mean the same?\n\nFirst: {sentence1}\n\nSecond: {sentence2}\n\nAnswer:",
        labels=("no", "yes"),
        texts=("sentence1", "sentence2"),
        metrics=("accuracy", "f1"),
        description="whether two sentences from the news mean the same",
        source="MRPC, Dolan and Brockett, 2005",
        example={**_PAIR, "label": 1, "idx": 0},
    ),
    _glue(
        name="glue/qqp",
        hub_config="qqp",
        few_shot_fraction=_LARGE,
        prompt="Do both questions ask the same?\n\nFirst: {question1}\n\nSecond: {question2}\n\nAnswer:",
        labels=("no", "yes"),
        texts=("question1", "question2"),
        metrics=("accuracy", "f1"),
        description="whether two questions ask the same",
        source="Quora Question Pairs, Iyer et al., 2017",
        example={"question1": "How do I mend a kettle?", "question2": "Who mends kettles?", "label": 0, "idx": 0},
    ),
    _glue(
        name="glue/stsb",
        hub_config="stsb",
        few_shot_fraction=_SMALL,
        prompt="How similar are both sentences, from 0 to 5?\n\nFirst: {sentence1}\n\nSecond: {sentence2}\n\nScore:",
        score=(0.0, 5.0),
        texts=("sentence1", "sentence2"),
        metrics=("pearson", "spearman"),
        description="how similar two sentences are, from 0 to 5",
        source="STS-B, Cer et al., 2017",
        example={**_PAIR, "label": 4.8, "idx": 0},
    ),
    _glue(
        name="glue/mnli",
        hub_config="mnli",
        few_shot_fraction=_LARGE,
        prompt="Does the second text follow from the first?\n\nFirst: {premise}\n\nSecond: {hypothesis}\n\nAnswer:",
        labels=("yes", "maybe", "no"),  # entailment, neutral, contradiction
        texts=("premise", "hypothesis"),
        splits={"train": "train", "validation": "validation_matched", "test": "validation_matched"},
        further_splits={"mismatched": {"validation": "validation_mismatched", "test": "validation_mismatched"}},
        description="whether a text entails, contradicts or leaves open another",
        source="MNLI, Williams et al., 2018",
        example={"premise": "Ida locked the door .", "hypothesis": "It was night .", "label": 1, "idx": 0},
    ),
    _glue(
        name="glue/qnli",
        hub_config="qnli",
        few_shot_fraction=_LARGE,
        prompt="Does the text answer the question?\n\nQuestion: {question}\n\nText: {sentence}\n\nAnswer:",
        labels=("yes", "no"),
        texts=("question", "sentence"),
        description="whether a sentence answers a question",
        source="QNLI, Rajpurkar et al., 2016; Wang et al., 2019",
        example={"question": "Who locked the door?", "sentence": "Ida locked the door .", "label": 0, "idx": 0},
    ),
    _glue(
        name="glue/rte",
        hub_config="rte",
        few_shot_fraction=_SMALL,
        prompt="Does the second text follow from the first?\n\nFirst: {sentence1}\n\nSecond: {sentence2}\n\nAnswer:",
        labels=("yes", "no"),  # entailment, not entailment
        texts=("sentence1", "sentence2"),
        description="whether one text entails another",
        source="RTE, Dagan et al., 2005, and after",
        example={**_PAIR, "label": 0, "idx": 0},
    ),
)
