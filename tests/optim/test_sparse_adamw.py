"""AdamW on kept entries against torch's own on everything with the masked entries put back, alone and in a Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_llm_ft.optim import SparseAdamW


def masked_by_hand(start: torch.Tensor, mask: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """torch's AdamW on the vector of kept entries."""
    kept = nn.Parameter(start[mask].clone())
    optimizer = torch.optim.AdamW([kept], lr=0.1, weight_decay=0.3)
    for gradient in gradients:
        kept.grad = gradient[mask].clone()
        optimizer.step()
    result = start.clone()
    result[mask] = kept.detach()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_indices", [False, True])
def test_kept_entries_are_updated_as_by_torch_and_the_others_stay(dtype: torch.dtype, as_indices: bool) -> None:
    torch.manual_seed(0)
    start, mask = torch.randn(7, 5, dtype=dtype), torch.rand(7, 5) < 0.4
    gradients = [torch.randn(7, 5, dtype=dtype) for _ in range(6)]
    parameter = nn.Parameter(start.clone())
    kept = mask.flatten().nonzero().flatten() if as_indices else mask
    optimizer = SparseAdamW([parameter], lr=0.1, weight_decay=0.3, kept={parameter: kept})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(parameter.detach(), masked_by_hand(start, mask, gradients))
    assert not torch.equal(parameter.detach()[mask], start[mask])


def test_state_is_there_when_built_and_as_large_as_what_is_kept() -> None:
    whole, part, nothing = (nn.Parameter(torch.ones(4, 6)) for _ in range(3))
    kept = {part: torch.tensor([0, 5, 23]), nothing: torch.zeros(4, 6, dtype=torch.bool)}
    optimizer = SparseAdamW([{"params": [whole]}, {"params": [part, nothing], "lr": 1.0}], kept=kept)
    sizes = [{key: t.numel() for key, t in optimizer.state[p].items()} for p in (whole, part, nothing)]
    assert sizes == [{"step": 1, "exp_avg": n, "exp_avg_sq": n} for n in (24, 3, 0)]
    assert optimizer.kept[part].dtype == torch.int32
    nothing.grad = torch.full((4, 6), float("nan"))  # of entries that are all masked: seen by nobody
    optimizer.step()
    assert torch.equal(nothing, torch.ones(4, 6)) and torch.equal(part, torch.ones(4, 6))


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (torch.ones(6, 4, dtype=torch.bool), "a mask of shape (6, 4) for a parameter of (4, 6)"),
        (torch.tensor([0, 24]), "must ascend and lie in 0 to 23"),
        (torch.tensor([-1, 2]), "must ascend and lie in 0 to 23"),
        (torch.tensor([3, 3]), "must ascend"),
        (torch.tensor([[1]]), "a vector of flat indices"),
        (torch.tensor([0.5]), "a vector of flat indices"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: torch.Tensor, problem: str) -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    with pytest.raises(ValueError, match=r".*") as error:
        SparseAdamW([parameter], kept={parameter: mask})
    assert problem in str(error.value)


def test_a_mask_of_a_foreign_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="1 masks belong to parameters"):
        SparseAdamW([nn.Parameter(torch.ones(2))], kept={nn.Parameter(torch.ones(2)): torch.tensor([0])})


def test_a_state_dict_goes_on_in_a_new_optimizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(9) for _ in range(6)]
    parameter = nn.Parameter(torch.ones(9))
    optimizer = SparseAdamW([parameter], lr=0.1, kept={parameter: torch.tensor([1, 4, 8])})
    for gradient in gradients[:3]:
        parameter.grad = gradient
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = nn.Parameter(parameter.detach().clone())
    again = SparseAdamW([other], lr=0.7, kept={other: torch.tensor([1, 4, 8])})
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for gradient in gradients[3:]:
        parameter.grad, other.grad = gradient, gradient
        optimizer.step()
        again.step()
    assert torch.equal(parameter, other) and not torch.equal(parameter, torch.ones(9))


class Line(nn.Module):
    """y = w · x, with the loss that a Trainer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((x @ self.weight - labels) ** 2).mean()}


def test_hugging_faces_trainer_takes_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    truth = torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0, 0.0])
    rows = [{"x": x, "labels": x @ truth} for x in torch.randn(32, 6)]
    model = Line()
    optimizer = SparseAdamW(model.parameters(), lr=0.1, kept={model.weight: torch.tensor([0, 1, 2])})
    options = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, options, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert torch.equal(model.weight.detach()[3:], torch.zeros(3))
    assert (model.weight.detach()[:3] - truth[:3]).abs().max() < 0.3
