"""Two-rank cases of sharded_loading.py: what is read, what is held meanwhile, and that nothing else differs."""

from __future__ import annotations

import gc
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import bitsandbytes
import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from helpers.case_tools import (
    MODEL,
    OBJECTIVE,
    RESULTS,
    SAMPLES,
    WORLD,
    case,
    engine_settings,
    long_case,
    make_loop,
    plan_for,
    start_values,
)
from sparse_llm_ft.adapters import add_adapters, change_plan, find_targets
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.engine import sharded_loading, shared_files
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.sharded_loading import load_sharded_model
from sparse_llm_ft.engine.shared_files import Reads
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.model.loading import DTYPES, head_modules, load_model
from sparse_llm_ft.model.resizing import new_rows
from sparse_llm_ft.plan import AdapterPlan, uniform_plan

KINDS = (("bfloat16", "nf4"), ("bfloat16", "none"), ("float32", "none"))


def settings_of(dtype: str) -> dict:
    return engine_settings(3, 2, dtype).to_deepspeed()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """4-bit codes stored as bfloat16 can read as NaN, which equals nothing."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def in_files(name: str, tied: bool = False, change: Callable[[dict], None] = lambda tensors: None) -> str:
    """A Llama in several files with an index, wide enough that no two modules are of like size."""
    folder = Path(RESULTS).with_name(name)
    if WORLD.rank == 0 and not folder.exists():
        torch.manual_seed(5)
        sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
        tensors = model.state_dict()
        if tied:
            del tensors["lm_head.weight"]
        change(tensors)
        model.save_pretrained(folder, state_dict=tensors, max_shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    dist.barrier()
    return str(folder)


@case
def a_sharded_base_is_the_base_loaded_whole() -> None:
    """Values, quantisation states and buffers bit for bit; one file or several, tied or not."""
    for folder in (MODEL, in_files("several"), in_files("tied", tied=True)):
        for dtype, quantization in KINDS:
            config = ModelConfig(name=folder, dtype=dtype, quantization=quantization)
            expected = load_model(config)
            with small_slices():
                sharded = load_sharded_model(config, settings_of(dtype))
            check_equal(expected, sharded)
            tied = sharded.get_output_embeddings().weight is sharded.get_input_embeddings().weight
            assert tied == sharded.config.tie_word_embeddings == folder.endswith("tied")


@contextmanager
def small_slices() -> Iterator[None]:
    """Several slices for a tensor."""
    with (
        mock.patch.object(sharded_loading, "SLICE_BYTES", 2**11),
        mock.patch.object(shared_files, "SLICE_BYTES", 2**11),
    ):
        yield


@case
def embeddings_grow_on_a_sharded_base_as_on_a_whole_one() -> None:
    """The same bits, tied or not, with 4-bit layers or not."""
    for name, tied, (dtype, quantization) in (("several", False, KINDS[0]), ("tied", True, KINDS[2])):
        folder = Path(in_files(name, tied=tied))
        grown = folder.with_name(f"{name}-grown")
        if WORLD.rank == 0 and not grown.exists():
            shutil.copytree(folder, grown)
            tokenizer = AutoTokenizer.from_pretrained(MODEL)
            tokenizer.add_tokens([f"<t{i}>" for i in range(104 - len(tokenizer))])
            tokenizer.save_pretrained(grown)
        dist.barrier()
        config = ModelConfig(name=str(grown), dtype=dtype, quantization=quantization, resize_embeddings=True)
        whole, sharded = load_model(config, seed=4), load_sharded_model(config, settings_of(dtype), seed=4)
        assert new_rows(sharded) == new_rows(whole) == range(101, 104)
        assert sharded.get_input_embeddings().weight.ds_shape == whole.get_input_embeddings().weight.shape
        check_equal(whole, sharded)
        assert (sharded.get_output_embeddings().weight is sharded.get_input_embeddings().weight) == tied


def check_equal(expected: nn.Module, sharded: nn.Module) -> None:
    parameters = dict(sharded.named_parameters())
    for name, one in expected.named_parameters():
        other = parameters.pop(name)
        assert other.numel() == 0 and other.dtype == one.dtype and not other.requires_grad, name
        assert other.ds_tensor.numel() == -(-one.numel() // WORLD.size), name
        state = getattr(one, "quant_state", None)
        scales = [] if state is None else [parameters.pop(f"{name}_absmax")]
        with deepspeed.zero.GatheredParameters([other, *scales]):
            assert torch.equal(as_bytes(other), as_bytes(one)), name
            assert other.shape == one.shape
            if state is not None:
                assert other.quant_state.absmax is scales[0]
                for part, whole_part in other.quant_state.as_dict(packed=True).items():
                    assert torch.equal(whole_part, state.as_dict(packed=True)[part]), (name, part)
    assert not parameters
    buffers = dict(sharded.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.named_buffers())


@case
def every_tensor_is_read_once_on_every_node() -> None:
    config = ModelConfig(name=in_files("several"), dtype="bfloat16", quantization="nf4")
    stored = {k: v for file in Path(config.name).glob("*.safetensors") for k, v in load_file(file).items()}
    for node, reads_here in (("one", WORLD.rank == 0), (str(WORLD.rank), True)):
        reads = Reads()
        check_equal(load_model(config), load_sharded_model(config, settings_of("bfloat16"), node=node, reads=reads))
        assert reads.tensors == (Counter(list(stored)) if reads_here else Counter()), (node, reads)
        assert reads.tensors.total() == reads_here * len(stored)
        assert reads.bytes == reads_here * sum(tensor.nbytes for tensor in stored.values())


@case
def a_rank_holds_its_shard_and_one_module() -> None:
    """Bytes of all live tensors: whenever a tensor has been read, whenever a parameter is set, and at the end."""
    check_held((KINDS[0], KINDS[2]))


@long_case
def a_rank_holds_its_shard_and_one_module_of_every_kind() -> None:
    check_held(KINDS)


def check_held(kinds: Sequence[tuple[str, str]]) -> None:
    for dtype, quantization in kinds:
        config = ModelConfig(name=in_files("several"), dtype=dtype, quantization=quantization)
        load_sharded_model(config, settings_of(dtype))  # bitsandbytes makes tables once
        gc.unfreeze()
        gc.collect()
        before = live()
        with watched() as moments:
            model = load_sharded_model(config, settings_of(dtype))
        assert len(moments) == 2 * 21, len(moments)
        for limit, held in moments:
            assert held <= limit, (dtype, quantization, limit, held)
        parameters = list(model.parameters())
        shards = sum(p.ds_tensor.nbytes for p in parameters)
        assert shards == sum(-(-p.ds_numel // WORLD.size) * p.element_size() for p in parameters)
        gc.collect()
        extra = sum(map(small_state, model.modules())) + sum(buffer.nbytes for buffer in model.buffers())
        first = 4  # bytes of the one value that DeepSpeed's converter is made with
        assert live() - before == shards + extra + first, (dtype, quantization, live() - before, shards, extra)
        del model, parameters


def live() -> int:
    """Bytes of all tensors that Python knows, storage by storage; without those that `gc.freeze` took out."""
    kinds = (torch.Tensor, nn.Parameter, bitsandbytes.nn.Params4bit)
    tensors = [o for o in gc.get_objects() if type(o) in kinds and o.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def small_state(module: nn.Module) -> int:
    """Of a 4-bit layer what every rank keeps: the scales' own scales, their mean, and two tables."""
    state = getattr(module, "quant_state", None)
    if state is None:
        return 0
    return sum(part.nbytes for part in (state.code, state.offset, state.state2.absmax, state.state2.code))


@contextmanager
def watched() -> Iterator[list[tuple[int, int]]]:
    """Moments of loading: the bytes that may be held (one module, whole, shards, small states), and that are held."""
    moments: list[tuple[int, int]] = []
    done: list[tuple[nn.Module, nn.Parameter]] = []

    def note(in_hand: int) -> None:
        kept = sum(p.ds_tensor.nbytes for m, _ in done for p in m.parameters(recurse=False) if hasattr(p, "ds_id"))
        limit = in_hand + kept + sum(small_state(module) for module, _ in done) + 2048  # 2048: not weights
        held = live()
        for _ in range(200):
            if held > limit:
                time.sleep(0.01)  # gloo's thread lets go of what it has sent a moment after the call returns
                held = live()
        moments.append((limit, held))

    def on_set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        # A list is what DeepSpeed is given to begin with.
        whole = not parameter.is_meta and not hasattr(parameter, "ds_id")
        if whole and not isinstance(module, nn.ParameterList) and not name.endswith("_absmax"):
            state = getattr(parameter, "quant_state", None)
            note(parameter.nbytes + (0 if state is None else state.absmax.nbytes + small_state(module)))
            done.append((module, parameter))

    read = shared_files.SharedTensor.to

    def reading(self, *args, **kwargs) -> torch.Tensor:
        value = read(self, *args, **kwargs)
        note(value.nbytes)
        return value

    hook = register_module_parameter_registration_hook(on_set)
    gc.collect()
    gc.freeze()  # what was there before is not counted, and not gone through
    with mock.patch.object(shared_files.SharedTensor, "to", reading):
        yield moments
    gc.unfreeze()
    hook.remove()


@case
def a_four_bit_base_is_nowhere_whole_between_forward_and_backward() -> None:
    """Of the layers gathered during a step, one at most is alive after the forward pass, and after backward. The layers
    without adapters count as well; bitsandbytes' own function keeps all that needs gradients.
    """
    config = ModelConfig(name=in_files("several"), dtype="bfloat16", quantization="nf4")
    for checkpointed in (False, True):
        base = load_sharded_model(
            config.model_copy(update={"gradient_checkpointing": checkpointed}), settings_of("bfloat16")
        )
        plan = plan_for(base)
        names = list(plan.modules)
        plan = AdapterPlan({name: a if name in names[::2] else None for name, a in plan.modules.items()})
        model = add_adapters(base, plan)
        released = {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
        }
        engine = Engine(
            model,
            replace(
                engine_settings(3, 2, "bfloat16"),
                extra={"zero_optimization": released | {"stage3_prefetch_bucket_size": 0}},
            ),
        )
        gathered: list[tuple[StorageWeakRef, int]] = []

        def note(layer: nn.Module, args: object, gathered: list = gathered) -> None:
            weight = layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight
            storage = weight.data.untyped_storage()
            assert storage.nbytes() >= weight.ds_numel
            gathered.append((StorageWeakRef(storage), storage.nbytes()))

        base_layers = {id(m.get_base_layer()) for m in model.modules() if hasattr(m, "get_base_layer")}
        for module in model.modules():
            if hasattr(module, "get_base_layer") or (hasattr(module, "quant_state") and id(module) not in base_layers):
                module.register_forward_pre_hook(note)
        batch = OBJECTIVE.batch(SAMPLES[:2])
        loss = OBJECTIVE.loss(engine.forward, batch)
        after_forward = sum(size for storage, size in gathered if not storage.expired())
        engine.backward(loss)
        after_backward = sum(size for storage, size in gathered if not storage.expired())
        largest = max(size for _, size in gathered)
        assert len(gathered) >= len(names)
        assert after_forward <= largest and after_backward <= largest, (after_forward, after_backward, largest)
        engine.close()
        model.unload()


@case
def a_step_keeps_the_same_activations_at_stages_2_and_3() -> None:
    """DeepSpeed's hooks put other tensors in place of activations; what those are computed from must stay known."""
    kept = []
    for stage in (2, 3):
        model = load_model(ModelConfig(name=MODEL, dtype="float32"))
        plan = plan_for(model)
        engine = Engine(add_adapters(model, plan), engine_settings(stage, 2, "float32"))
        found: dict[int, torch.Tensor] = {}

        def pack(value: torch.Tensor, found: dict = found, width: int = model.config.hidden_size) -> torch.Tensor:
            small = value.numel() <= width  # a norm's weight is copied at stage 3
            if not (isinstance(value, nn.Parameter) or small):
                found[value.untyped_storage().data_ptr()] = value
            return value

        engine.module.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            OBJECTIVE.loss(engine.forward, OBJECTIVE.batch(SAMPLES[:2]))
        kept.append(Counter(tuple(value.shape) for value in found.values()))
        engine.close()
    assert kept[0] == kept[1], kept


@case
def there_is_no_graph_below_the_lowest_adapter() -> None:
    """With and without checkpointing, at stages 2 and 3: what enters that layer needs no gradient, and backward calls
    no layer below it.
    """
    for stage, checkpointed in ((2, False), (2, True), (3, False), (3, True)):
        base = load_model(ModelConfig(name=MODEL, dtype="float32", gradient_checkpointing=checkpointed))
        layers = base.model.layers
        plan = plan_for(base)
        last = f".{len(layers) - 1}."
        plan = AdapterPlan({name: a if last in name else None for name, a in plan.modules.items()})
        engine = Engine(add_adapters(base, plan), engine_settings(stage, 2, "float32"))
        engine.module.train()
        needed, calls = [], Counter()

        def enters(layer: nn.Module, args: tuple, output: object, needed: list = needed) -> None:
            value = output[0] if isinstance(output, tuple) else output
            needed.append(value.requires_grad)

        for number, layer in enumerate(layers):
            layer.register_forward_hook(enters)
            layer.register_forward_pre_hook(lambda *_, number=number, calls=calls: calls.update([number]))
        loss = OBJECTIVE.loss(engine.forward, OBJECTIVE.batch(SAMPLES[:2]))
        assert needed == [False] * (len(layers) - 1) + [True], (stage, checkpointed, needed)
        calls.clear()
        engine.backward(loss)
        assert set(calls) <= {len(layers) - 1}, (stage, checkpointed, calls)
        engine.close()
        engine.module.unload()


@case
def a_sharded_base_trains_as_a_whole_one() -> None:
    """Equal losses before, during and after a change of plan with a new engine; the base's bytes stay."""
    check_training(*KINDS[0])


@long_case
def a_sharded_base_trains_as_a_whole_one_in_float32() -> None:
    check_training(*KINDS[2])


def check_training(dtype: str, quantization: str) -> None:
    config = ModelConfig(name=in_files("several"), dtype=dtype, quantization=quantization)
    whole_base = losses_of(load_model(config), dtype)
    sharded = load_sharded_model(config, settings_of(dtype))
    assert losses_of(sharded, dtype) == whole_base, (dtype, quantization)
    assert whole_base[1] != whole_base[-2], "nothing was learned: the comparison shows nothing"
    check_equal(load_model(config), sharded)


@case
def what_an_encoders_checkpoint_lacks_is_drawn_as_without_sharding() -> None:
    """A fresh head has the values that `load_model` draws, stays whole until the engine cuts it, and is not 4-bit."""
    folder = Path(RESULTS).with_name("encoder")
    if WORLD.rank == 0 and not folder.exists():
        heads = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64}
        BertModel(BertConfig(vocab_size=23, hidden_size=16, intermediate_size=24, **heads)).save_pretrained(folder)
    dist.barrier()
    for dtype, quantization in KINDS:
        config = ModelConfig(name=str(folder), dtype=dtype, quantization=quantization)
        task_mode = TaskMode("sequence_classification", 3)
        expected, sharded = (
            load_model(config, task_mode, 7),
            load_sharded_model(config, settings_of(dtype), task_mode, 7),
        )
        for name in ("classifier.weight", "classifier.bias"):
            assert torch.equal(sharded.get_parameter(name), expected.get_parameter(name)), (name, quantization)
        assert sharded.classifier.weight.abs().max() > 0
        for name in head_modules(expected):
            setattr(expected, name, None)
            setattr(sharded, name, None)
        check_equal(expected, sharded)


def losses_of(base: nn.Module, dtype: str) -> list[float]:
    plan = plan_for(base)
    first = next(name for name in plan.modules if "q_proj" in name)
    smaller = AdapterPlan({name: plan.modules[name] if name == first else None for name in plan.modules})
    torch.manual_seed(0)
    model = add_adapters(base, plan)
    start, losses = start_values(model), []
    for current in (plan, smaller):
        model = change_plan(model, plan, current)
        # Threshold 0: nothing is left whole after its first use, so every layer is gathered in every pass.
        gathers = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        engine = Engine(model, replace(engine_settings(3, 2, dtype), extra=gathers))
        assert {p.dtype for p in engine.parameters.values()} == {DTYPES[dtype]}
        losses.append(mean_loss(engine.module, SAMPLES[:5], OBJECTIVE, 2, WORLD.rank, WORLD.size))
        engine.load({name: start[name] for name in engine.parameters})
        steps = make_loop(engine, current, 2, Progress()).steps()
        losses += [step.loss for _, step in zip(range(4), steps, strict=False)]
        losses.append(mean_loss(engine.module, SAMPLES[:5], OBJECTIVE, 2, WORLD.rank, WORLD.size))
        engine.close()
    model.unload()
    return losses


@long_case
def pefts_own_tuners_start_on_a_sharded_base() -> None:
    for tuner, quantization in (("lora", "nf4"), ("vera", "nf4"), ("vera", "none")):
        config = ModelConfig(name=MODEL, dtype="bfloat16", quantization=quantization)
        found = []
        for base in (load_model(config), load_sharded_model(config, settings_of("bfloat16"))):
            plan = replace(uniform_plan(find_targets(base, "all-linear"), 4, 8, 0.0), tuner=tuner)
            torch.manual_seed(0)
            model = add_adapters(base, plan)
            engine = Engine(model, engine_settings(3, 2, "bfloat16"))
            found.append(engine.values())
            engine.close()
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items()), (tuner, quantization)


@case
def weights_that_do_not_fit_stop_every_rank_with_one_line() -> None:
    def left_over(tensors: dict) -> None:
        tensors["model.layers.9.what.weight"] = torch.ones(3)

    def lacking(tensors: dict) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def longer(tensors: dict) -> None:
        tensors["model.norm.weight"] = torch.ones(65)

    for change, message in (
        (left_over, "the model lacks: model.layers.9.what.weight"),
        (lacking, "lacks weights: model.layers.1.mlp.up_proj.weight"),
        (longer, "another shape: model.norm.weight"),
    ):
        config = ModelConfig(name=in_files(change.__name__, change=change), dtype="bfloat16", quantization="nf4")
        for load in (load_model, lambda config: load_sharded_model(config, settings_of("bfloat16"))):
            with pytest.raises(ConfigError, match=message):
                load(config)
