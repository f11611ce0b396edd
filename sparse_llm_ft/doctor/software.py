"""Checks of libraries, of what they compile and load, and of the hub."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from sparse_llm_ft.doctor.findings import Finding, ok, problem, warning
from sparse_llm_ft.errors import reason_of

PACKAGE = "sparse-llm-ft"
_PUBLIC = "openai-community/gpt2"
_SHOWN = ("torch", "transformers", "deepspeed", "bitsandbytes", "peft", "accelerate", "datasets")


def versions() -> Iterator[Finding]:
    """Python, and every dependency against the range that this package declares."""
    yield ok("python", sys.version.split()[0])
    try:
        declared = [Requirement(text) for text in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        yield warning("versions", f"{PACKAGE} is not installed here, so its ranges are not known", "pip install it")
        return
    right = []
    for requirement in declared:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, requirement.specifier
        try:
            found = version(name)
        except PackageNotFoundError:
            yield problem("versions", f"{name} is missing", f"pip install '{name}{wanted}'")
            continue
        if not wanted.contains(found, prereleases=True):
            yield problem("versions", f"{name} {found} is outside {wanted}", f"pip install '{name}{wanted}'")
        elif name in _SHOWN:
            right.append(f"{name} {found}")
    yield ok("versions", ", ".join(right))


def four_bit() -> Iterator[Finding]:
    """Quantise a small weight and multiply with it, as `model.quantization: nf4` does."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.linspace(-1, 1, 64 * 64).view(64, 64).to(device)
    codes, state = quantize_4bit(values, quant_type="nf4")
    error = float((dequantize_4bit(codes, state) - values).abs().max())
    if error > 0.2:  # half of the widest gap between nf4's values
        yield problem("4-bit", f"a weight of at most 1 comes back {error:.2f} off", "reinstall bitsandbytes")
    else:
        yield ok("4-bit", f"bitsandbytes quantises on {device}")


def deepspeed_loads() -> Iterator[Finding]:
    """Whether DeepSpeed loads, and the kind of device that it uses."""
    from sparse_llm_ft.engine.library import describe_library

    yield ok("deepspeed", describe_library())


def compilers() -> Iterator[Finding]:
    """A C++ compiler, and Triton where there is a GPU: for `training.compile` and fused element-wise parts."""
    import torch
    from torch.utils._triton import has_triton

    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        yield warning(
            "compiler",
            "no C++ compiler on the path",
            "install g++ for training.compile, fused element-wise parts on a GPU, and offloading",
        )
    else:
        yield ok("compiler", compiler)
    if torch.cuda.is_available():
        if has_triton():
            yield ok("triton", "found")
        else:
            yield warning("triton", "not usable", "install triton: element-wise parts are not fused without it")


def hub() -> Iterator[Finding]:
    """Whether the Hugging Face hub answers, unless the environment forbids asking; never a token's text."""
    from huggingface_hub import HfApi, constants, get_token

    token = "a token is set" if get_token() else "no token is set"
    if constants.HF_HUB_OFFLINE:
        yield ok("hub", f"HF_HUB_OFFLINE is set: models come from {constants.HF_HUB_CACHE}")
        return
    try:
        HfApi().model_info(_PUBLIC, timeout=5.0)
    except Exception as error:  # of the network, of a proxy, of the hub: a run from a folder needs none of them
        yield warning(
            "hub",
            f"no answer ({type(error).__name__}: {reason_of(error, 100)}), {token}",
            "give model.name a folder, or fill the cache elsewhere and set HF_HUB_OFFLINE=1",
        )
    else:
        yield ok("hub", f"answers, {token}")


def cache_folder() -> str:
    """Where models from the hub lie, without importing its library."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")  # noqa: PTH118
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))  # noqa: PTH111, PTH118
