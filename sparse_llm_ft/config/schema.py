"""The settings of a run, typed. Every section is a contract with the YAML files; unknown keys are errors.

Imports no torch, so the run reports a wrong setting within a second.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictInt, field_serializer

from sparse_llm_ft.config.registry import Methods
from sparse_llm_ft.config.types import MAX_BATCH, OFF, Bytes, Date, ExpandedPath, FilePath, Float, Int, Section
from sparse_llm_ft.plan import MAX_RANK

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "rouge", "bleu", "squad"]
"""``rouge`` is ROUGE-1, 2, L and Lsum; ``squad`` exact match and F1 of answers."""


class ModelConfig(Section):
    """The pretrained base.

    Attributes:
        name: a hub id or a local folder in Hugging Face layout.
        revision: branch, tag or commit on the hub.
        dtype: type of the base's weights and of the computation.
        quantization: 4-bit storage of the base's linear layers by bitsandbytes (double quantisation, computation in
            `dtype`).
        lean: whether element-wise parts and the loss of a base that has the Llama family's structure keep less for
            backward or take fewer kernels (model/lean.py, model/head_loss.py); other bases run unchanged.
        trust_remote_code: whether code from the model's repository or folder may run in this process.
        resize_embeddings: give the input embeddings and the output head a row for each token of the tokenizer, if it
            has more than they do.
        stage_to: a folder on each node's own disk, into which the first process of the node copies the base's files,
            once; weights are then read from there. Environment variables are replaced on the node
            (model/base_files.py).
    """

    name: ExpandedPath = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantization: Literal["none", "nf4", "fp4"] = "none"
    gradient_checkpointing: StrictBool = False
    lean: Annotated[Literal["auto", "off"], OFF] = "auto"
    attn_implementation: str | None = None
    trust_remote_code: StrictBool = False
    resize_embeddings: StrictBool = False
    stage_to: FilePath | None = Field(None, min_length=1)


class TaskConfig(Section):
    """The task and its data.

    Attributes:
        name: an entry of the task registry (`sparse-llm-ft tasks` lists them).
        path: local folder with a file for each split (``train.jsonl``, ``validation.csv``, ...); without it the
            task's data set is loaded from the hub.
        mode: how the model learns the task; ``auto`` chooses a head for an encoder (for labels or for spans),
            ``seq2seq_lm`` for an encoder-decoder, ``causal_lm`` for a decoder.
        max_length: most tokens of prompt and completion together. In ``seq2seq_lm`` each of the two may be as long.
            Texts for a head are truncated at their end.
        max_prompt_length: most tokens of a prompt; longer prompts are truncated in the middle. None: three quarters of
            `max_length`; with labels or scores, what the longest of them leaves; in ``seq2seq_lm`` all of it. A
            completion that is longer than the rest takes the room from its own prompt and is never truncated.
        prompt, completion: templates with ``{column}`` fields; None takes the task's own.
        messages: column of chats, lists of ``{role, content}``, instead of `prompt` and `completion`.
        chat_template: a chat template in Jinja, instead of the tokenizer's. A file's name is replaced by the file's
            text, so that a run's config.yaml is complete.
        chat_template_kwargs: arguments of the chat template, such as ``{enable_thinking: false}``.
        date: what a chat template that asks for the date takes for the present, in ISO 8601; None: when the run begins.
        labels: makes the task a classification: the label words in the order of the integer labels.
        score: makes the task a regression: lowest and highest score.
        texts: columns an encoder sees, one or a pair; None takes the task's own, or those of its prompt.
        label_column: holds the integer label, the label word, or the score; None takes the task's own.
        references: further columns with completions that count as right.
        metrics: the measured metrics; None takes the task's own.
        on_bad_row: whether a bad row ends the run, or is skipped and counted.
        packing: put several short samples into one sequence of at most `max_length` tokens; batch sizes then count
            sequences.
        streaming: read training rows as they are needed, in file order through a shuffle buffer, for data that fit
            neither memory nor the disk's cache; needs `training.max_steps`.
        shuffle_buffer: number of rows among which streaming draws the next one.
    """

    name: str
    path: ExpandedPath | None = None
    mode: Literal["auto", "sequence_classification", "question_answering", "causal_lm", "seq2seq_lm"] = "auto"
    max_length: Int = Field(512, ge=8)
    max_prompt_length: Int | None = Field(None, ge=1)
    prompt: str | None = Field(None, min_length=1)
    completion: str | None = Field(None, min_length=1)
    messages: str | None = Field(None, min_length=1)
    chat_template: str | None = Field(None, min_length=1)
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    date: Date | None = None
    labels: tuple[str, ...] | None = Field(None, min_length=2)
    score: tuple[Float, Float] | None = None
    texts: tuple[str, ...] | None = Field(None, min_length=1, max_length=2)
    label_column: str | None = Field(None, min_length=1)
    references: tuple[str, ...] | None = None
    metrics: tuple[Metric, ...] | None = Field(None, min_length=1)
    on_bad_row: Literal["error", "skip"] = "error"
    packing: StrictBool = False
    streaming: StrictBool = False
    shuffle_buffer: Int = Field(10_000, ge=1)


class AdapterConfig(Section):
    """Size and place of a method's first adapters.

    Attributes:
        target_modules: ``all-linear`` (every linear layer but the output head), a list of name endings as in PEFT,
            or a regular expression that must match the whole module name.
        modules_to_save: endings of modules that are trained whole beside the adapters (``embed_tokens``, ``lm_head``).
        trainable_tokens: tokens, or their numbers, whose rows of the embeddings (and of the output head, if it has
            weights of its own) are trained.
    """

    r: Int = Field(8, ge=1, le=MAX_RANK)
    lora_alpha: Float = Field(32.0, gt=0)
    lora_dropout: Float = Field(0.05, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: tuple[Int | str, ...] = ()


LOSS = "loss"
"""The metric that every task has: the mean loss of the validation split."""


class EarlyStopping(Section):
    """When training stops before its end.

    Attributes:
        metric: as in `TrainingConfig.keep_best`.
        patience: validations in a row without a better value.
    """

    metric: str = LOSS
    patience: Int = Field(ge=1)


class TrainingConfig(Section):
    """Training: batches, learning rate, steps, checkpoints.

    Attributes:
        micro_batch_size: samples a rank sees in one forward pass; ``auto``: the most that the planner finds to fit into
            the device's memory.
        device_memory: bytes of memory that each process may use, for what is planned; None: its GPU's.
        global_batch_size: samples of one optimizer step over all ranks; accumulation steps follow from it.
        learning_rate: of the adapters, or of the whole model.
        head_learning_rate: of what is trained whole beside adapters: a fresh head, ``adapter.modules_to_save``,
            ``adapter.trainable_tokens``. It follows the same schedule; None: `learning_rate`.
        epochs: passes over the training set; unused when `max_steps` is given.
        max_steps: optimizer steps of the whole run.
        schedule: the learning rate after `warmup_steps` (a linear rise from the first step on).
        save_every: optimizer steps between checkpoints; None saves only at the end of phases.
        eval_every: optimizer steps between validations; None never validates.
        keep_checkpoints: how many of the newest checkpoints are kept; None keeps all.
        max_skipped_updates: how many updates in a row may be skipped because loss or gradients are not finite; one
            more ends the run.
        prefix_cache: where each process keeps the hidden states that enter the lowest layer with an adapter, so that
            the layers below run once for each sample (training/prefix_cache.py).
        prefix_cache_bytes: most bytes of them on each process.
        keep_best: ``loss``, or a number that the task's metrics give (``accuracy``, ``rougeL``): the step with the best
            validation is kept, measured and exported in place of the last one. Validations of the run's last phase
            count, and a metric is taken on the first `evaluation.samples` of the validation split.
        early_stopping: ends the last phase before its end; None: it does not.
        on_oom: whether running out of memory in a step ends the run, or halves the micro-batch, with twice the
            accumulation, and makes the step again (engine/memory_guard.py).
        compile: ``layers`` compiles each layer with torch.compile when it is first called; same losses up to rounding.
    """

    micro_batch_size: Annotated[Int, Field(ge=1)] | Literal["auto"] = 1
    device_memory: Bytes | None = Field(None, ge=1)
    global_batch_size: Int = Field(16, ge=1, le=MAX_BATCH)
    learning_rate: Float = Field(1e-4, gt=0)
    head_learning_rate: Float | None = Field(None, gt=0)
    epochs: Float = Field(1.0, gt=0)
    max_steps: Int | None = Field(None, ge=1)
    warmup_steps: Int = Field(0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Float = Field(0.0, ge=0)
    max_grad_norm: Float = Field(1.0, ge=0)
    save_every: Int | None = Field(None, ge=1)
    eval_every: Int | None = Field(None, ge=1)
    log_every: Int = Field(1, ge=1)
    keep_checkpoints: Int | None = Field(None, ge=2)
    max_skipped_updates: Int = Field(3, ge=0)
    prefix_cache: Annotated[Literal["off", "memory", "disk"], OFF] = "off"
    prefix_cache_bytes: Int = Field(2**33, ge=1)
    keep_best: str | None = None
    early_stopping: EarlyStopping | None = None
    on_oom: Literal["error", "shrink"] = "error"
    compile: Annotated[Literal["off", "layers"], OFF] = "off"

    @property
    def fixed_micro_batch_size(self) -> int:
        """The micro-batch as a number; 1 while it is still to be decided."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def watched_metric(self) -> str | None:
        """What `keep_best` and `early_stopping` follow; None: nothing."""
        return self.keep_best or (None if self.early_stopping is None else self.early_stopping.metric)


class EvaluationConfig(Section):
    """Measurements before and after training.

    Attributes:
        split: the split of ``metrics.before`` and ``metrics.after``.
        samples: how many of the split's first samples; 0 measures nothing.
        max_new_tokens: most tokens of a generated completion.
        micro_batch_size: samples a rank evaluates at once.
        num_beams: width of the beam search; 1 is greedy.
        length_penalty: exponent of the length that a beam's score is divided by.
        temperature: above 0, completions are sampled from the softmax of the logits divided by it. Each has its own
            seed, so neither batch nor ranks matter. 0 takes the most probable tokens.
        top_p: least probability mass that sampling draws from.
    """

    split: Literal["validation", "test"] = "test"
    samples: Int = Field(100, ge=0)
    max_new_tokens: Int = Field(64, ge=1, le=2**20)
    micro_batch_size: Int = Field(8, ge=1)
    num_beams: Int = Field(1, ge=1, le=64)
    length_penalty: Float = 1.0
    temperature: Float = Field(0.0, ge=0)
    top_p: Float = Field(1.0, gt=0, le=1)


class DeepSpeedConfig(BaseModel):
    """`zero_stage`, and any DeepSpeed setting, which is merged into DeepSpeed's configuration.

    Settings that other sections own are errors here, see `MANAGED`.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    zero_stage: Annotated[Int, Field(ge=0, le=3)] = 2

    @property
    def extra(self) -> dict[str, Any]:
        """The settings that are merged into DeepSpeed's configuration."""
        return dict(self.model_extra or {})


_SECTIONS = (
    *("aio", "autotuning", "checkpoint", "comms_logger"),
    *("compression_training", "csv_monitor", "data_efficiency", "data_types", "eigenvalue", "flops_profiler", "nebula"),
    *("tensorboard", "timers", "torch_autocast", "wandb", "zero_optimization"),
)
_SWITCHES = (
    *("disable_allgather", "dump_state", "memory_breakdown", "prescale_gradients", "sparse_gradients"),
    *("use_data_before_expert_parallelism", "wall_clock_breakdown"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)
PASSED_THROUGH: dict[str, Any] = {
    **dict.fromkeys(_SECTIONS, dict[str, Any]),
    **dict.fromkeys(_SWITCHES, StrictBool),
    **dict.fromkeys(("communication_data_type", "seq_parallel_communication_data_type"), str | None),
    "gradient_predivide_factor": Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)],
    "steps_per_print": Annotated[StrictInt, Field(ge=1)] | None,
}
"""DeepSpeed's own top-level settings (deepspeed.ai/docs/config-json) and their types. It ignores any other key
silently, so a misspelt one must be caught here."""

MANAGED = {
    "activation_checkpointing": "model.gradient_checkpointing",
    "compile": "training.compile",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "optimizer": "training.learning_rate and method",
    "scheduler": "training.schedule",
}
"""DeepSpeed setting -> the setting of another section that owns it."""


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "swanlab"]


class RunConfig(Section):
    """All settings of one run.

    Attributes:
        trackers: where the numbers of logged steps go besides metrics.jsonl (training/trackers.py).
        tracker_project: the project or experiment that trackers file the run under.
    """

    model: ModelConfig
    task: TaskConfig
    method: Methods
    output_dir: ExpandedPath = Field(min_length=1)
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    seed: Int = Field(0, ge=0, lt=2**63)
    resume: Literal["auto", "never"] = "auto"
    report: StrictBool = True
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    tracker_project: str = Field("sparse-llm-ft", pattern=r"^[\w .-]{1,100}$")

    @field_serializer("method")
    def _as_written(self, methods: Methods) -> Any:
        """A mapping for one method, a list for several."""
        dumped = [method.model_dump(mode="json") for method in methods]
        return dumped[0] if len(dumped) == 1 else dumped

    @property
    def memory_budget(self) -> int | None:
        """Bytes of each device that every phase must fit into, as planned: the least of the methods'."""
        return min((m.memory_budget for m in self.method if m.memory_budget is not None), default=None)

    @property
    def method_name(self) -> str:
        """For people: ``lora_drop + partial_lora``."""
        return " + ".join(method.name for method in self.method)
