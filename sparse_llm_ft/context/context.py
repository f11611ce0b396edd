"""`RunContext`: all that is known about a run before weights and data are read. Every command opens a run with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_llm_ft.adapters import find_targets, linear_modules
from sparse_llm_ft.adapters.left_out import LeftOut, find_left_out, refuse_left_out
from sparse_llm_ft.checkpoint.validation import Expected
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.context.prefix_cache import check_prefix_cache
from sparse_llm_ft.context.trained_modules import check_trained, covers, modules_to_save, remark_on_new_rows, token_rows
from sparse_llm_ft.data.chat import ChatFormat, apply_chat_settings, with_date
from sparse_llm_ft.data.dataset import EvalSplit
from sparse_llm_ft.data.tasks import Task, escaped_columns
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.settings import check_deepspeed
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.evaluation.evaluator import Evaluator
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.methods.chain import Chain, build_methods
from sparse_llm_ft.model.buffers import remember_fixed
from sparse_llm_ft.model.limits import check_lengths, tokenizer_for
from sparse_llm_ft.model.loading import empty_model, find_model_task_mode, find_quantization
from sparse_llm_ft.model.multimodal import text_modules, unreached, unreached_parts
from sparse_llm_ft.model.step_cost import StepCost, step_cost
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.objectives.build import build_objective, check_packing
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, Shape, uniform_plan
from sparse_llm_ft.run_folder import RunFolder
from sparse_llm_ft.scoring import Derivation


@dataclass(frozen=True)
class RunContext:
    """A run whose settings, architecture and tokenizer fit together.

    Attributes:
        task: the registry's task with the config's settings.
        task_mode: how the model learns the task.
        empty: the base on the meta device.
        targets: every target module, in the model's order: name -> (out_features, in_features).
        left_out: weights that no adapter can go on.
        plan: the uniform plan over `targets`, from which the methods start.
    """

    config: RunConfig
    world: World
    console: Console
    folder: RunFolder
    task: Task
    task_mode: TaskMode
    empty: PreTrainedModel
    targets: dict[str, Shape]
    left_out: LeftOut
    plan: AdapterPlan
    tokenizer: PreTrainedTokenizerBase
    objective: Objective[Any]

    @classmethod
    def open(
        cls,
        config: RunConfig,
        world: World,
        task: Task,
        begun: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        console: Console | None = None,
    ) -> RunContext:
        """Check every setting that model and DeepSpeed can check before weights are loaded.

        `train`, `derive`, `check` and `evaluate` all call it, so they refuse the same settings. It is not a collective:
        a process may call it before it joins the process group.

        Args:
            task: the result of `preflight`.
            begun: whether the run has a plan already, in a checkpoint; so has one whose folder holds checkpoints.
            tokenizer: in place of the model's own, for planning without one.
            console: shows what is logged; None: on standard output.

        Raises:
            ConfigError: naming the setting.
        """
        console = Console(world.rank) if console is None else console
        check_deepspeed(config.deepspeed.extra, config.deepspeed.zero_stage, config.model.dtype)
        if config.model.trust_remote_code:
            console.log(
                f"model.trust_remote_code is set: code from {config.model.name}, at revision "
                f"{config.model.revision or 'main'}, runs in this process"
            )
        # The form of the base's weights, which its own config may decide.
        model = find_quantization(config.model)
        if model != config.model:
            console.log(f"model.quantization is {model.quantization}: {model.name} is stored so")
            config = config.model_copy(update={"model": model})
        for method in config.method:
            method.check_run(config)
        # Architecture: which modules get adapters, and which are fully trained.
        task_mode = find_model_task_mode(config.model, task, config.task.mode)
        empty = empty_model(config.model, config.model.attn_implementation, task_mode)
        whole = modules_to_save(config, empty)
        reached = text_modules(empty, config.model.name)
        remember_fixed(empty, unreached_parts(empty, config.model.name))
        found = find_targets(empty, config.adapter.target_modules, reached)
        # What is fully trained, such as a fresh pooler, gets no adapter.
        targets = {name: shape for name, shape in found.items() if not covers(whole, name)}
        if not targets:
            raise ConfigError(
                "adapter.modules_to_save",
                f"{', '.join(whole)} has every module that would get an adapter",
                "expected fewer, or method full",
            )
        plan = uniform_plan(targets, config.adapter.r, config.adapter.lora_alpha, config.adapter.lora_dropout, whole)
        # Text: lengths, tokenizer, loss.
        check_lengths(config, task, task_mode, empty)
        tokenizer = tokenizer_for(config.model, task_mode, empty) if tokenizer is None else tokenizer
        rows = token_rows(config, empty, tokenizer, whole)
        plan = replace(plan, trained=(*whole, *rows), rows=rows)
        if config.task.packing:
            check_packing(empty)
        chat = apply_chat_settings(tokenizer, config.task, task_mode.mode == "causal_lm")
        objective = build_objective(empty, tokenizer, task, chat.end_token_id)
        folder = RunFolder(config.output_dir)
        left_out = find_left_out(empty, reached)
        context = cls(
            config, world, console, folder, task, task_mode, empty, targets, left_out, plan, tokenizer, objective
        )
        first = context.first_phase()  # refuses methods that do not fit this many adapters
        check_trained(config, first.plan, empty)
        check_prefix_cache(config, first.plan, empty)
        for line in remark_on_new_rows(first.plan, empty):
            console.log(line)
        context._check_coverage(FULL_MODEL in first.plan.trained, reached, begun or folder.has_checkpoints())
        return context

    def _check_coverage(self, full: bool, reached: Collection[str] | None, begun: bool) -> None:
        """Refuse settings that would leave weights out without a word, and log which ones a run leaves out.

        Args:
            full: whether the run trains the base itself.
            reached: of a multimodal model, the modules that a text reaches.
            begun: whether the run has its plan; then nothing of it is decided here.
        """
        linear = linear_modules(self.empty)
        if reached is not None and (others := unreached(linear, reached)):
            names = ", ".join(others[:5])
            self.console.log(f"a text does not reach {names} of {self.config.model.name}, which stay as they are")
        if not self.left_out.kinds or full:
            return
        if not begun:
            refuse_left_out(self.config.adapter.target_modules, self.left_out, self.targets)
        self.console.log(f"no adapter can go on {self.left_out.describe()}, which stay as they are")
        if self.config.model.quantization != "none":
            self.console.log(
                f"model.quantization: {self.config.model.quantization} is for linear layers; "
                f"{self.left_out.describe()} stay in {self.config.model.dtype}"
            )

    def dated(self, agree: Callable[[str], str] = str) -> RunContext:
        """Collective, as `agree` is. The context with the date that a chat template gets, if it asks for one.

        It is that of the run's beginning, which is the present for a new run.

        Args:
            agree: returns rank 0's text.
        """
        task, chat = self.config.task, ChatFormat.of(self.tokenizer, self.config.task)
        if self.task_mode.mode != "causal_lm" or not chat.uses_date:
            return self
        stored = self.folder.config().task.date if self.folder.has_config() else None
        return replace(self, config=self.config.model_copy(update={"task": with_date(task, chat, stored, agree)}))

    def remarks(self) -> list[str]:
        """Log lines about prompts: names in doubled braces, and what the chat template does."""
        lines = [
            f"{setting}: {{{{{name}}}}} writes the text {{{name}}}; the column would be {{{name}}}"
            for setting, template in (("task.prompt", self.task.prompt), ("task.completion", self.task.completion))
            for name in escaped_columns(template or "")
        ]
        if self.task_mode.mode != "causal_lm":
            return lines
        return lines + ChatFormat.of(self.tokenizer, self.config.task).remarks()

    def evaluator(self, parts: Sequence[EvalSplit]) -> Evaluator:
        """An evaluator of this run's models on `parts`."""
        return Evaluator(
            self.config.evaluation,
            self.task,
            self.task_mode,
            parts,
            self.tokenizer,
            self.objective,
            self.world,
            self.config.deepspeed.zero_stage,
            self.config.seed,
            self.console,
            ChatFormat.of(self.tokenizer, self.config.task).end_token_id,
        )

    def first_phase(self) -> Phase:
        """The run's first phase, except for what depends on the run's length.

        Raises:
            ConfigError: a method's settings do not fit this many adapters.
        """
        return self.methods(1).first(self.plan, self.targets)

    def methods(
        self,
        total_steps: int,
        memory: Callable[[AdapterPlan], int] | None = None,
        derived: Callable[[Phase], Derivation | None] | None = None,
    ) -> Chain:
        """The run's methods.

        Args:
            total_steps: the run's optimizer steps at its initial global batch.
            memory, derived: see `MethodInputs`.
        """
        return build_methods(self.config, total_steps, self.cost, memory, derived)

    @cached_property
    def cost(self) -> StepCost:
        """The base's arithmetic, for samples as long as the settings allow."""
        task = self.config.task
        return step_cost(self.empty, self.targets, task.max_length, task.max_prompt_length or task.max_length)

    @property
    def embeddings(self) -> int | None:
        """Number of tokens that the base has embeddings for; None if its embeddings do not say."""
        rows = getattr(self.empty.get_input_embeddings(), "num_embeddings", None)
        return rows if isinstance(rows, int) else None

    @property
    def expected(self) -> Expected:
        """What a checkpoint of this run must match."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.empty.named_parameters()}
        return Expected(self.targets, shapes, len(self.config.method))
