"""Two-rank cases of sharded_loading.py: what is read, what is held meanwhile, and that nothing else differs."""

from __future__ import annotations

import gc
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import bitsandbytes
import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from helpers.case_tools import (
    MODEL,
    RESULTS,
    WORLD,
    case,
    engine_settings,
    long_case,
)
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.engine import sharded_loading, shared_files
from sparse_llm_ft.engine.sharded_loading import load_sharded_model
from sparse_llm_ft.engine.shared_files import Reads
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.loading import head_modules, load_model
from sparse_llm_ft.model.resizing import new_rows

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
