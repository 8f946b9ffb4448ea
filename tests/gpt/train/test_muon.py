"""Muon's steps: PyTorch's own but for the rounding, on any processor and in any number of parts."""

import pytest
import torch

from gpt.train.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
def test_orthogonalizing_brings_the_singular_values_near_one_and_turns_nothing(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    found = orthogonalized(matrix * 1e-3)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ found @ v.T  # diagonal, in the directions of the matrix itself
    assert (turned - turned.diag().diag()).abs().max() < 1e-4
    torch.testing.assert_close(orthogonalized(matrix * 7), found, atol=1e-4, rtol=0)


def test_a_matrix_of_zeros_stays_one():
    assert orthogonalized(torch.zeros(3, 5)).count_nonzero() == 0


def test_a_step_is_that_of_pytorch_but_for_its_rounding_to_bfloat16():
    torch.manual_seed(2)
    start, gradients = torch.randn(12, 40), torch.randn(4, 12, 40)
    ends = []
    for make in (Muon, torch.optim.Muon):
        matrix = torch.nn.Parameter(start.clone())
        own = {"adjust_lr_fn": "match_rms_adamw"} if make is torch.optim.Muon else {}
        optimizer = make([matrix], lr=0.1, weight_decay=0.2, momentum=0.9, **own)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        ends.append(matrix.detach())
    ours, theirs = ends
    assert (start - theirs).norm() > 1
    assert (ours - theirs).norm() < 0.02 * (start - theirs).norm()


def test_a_matrix_without_a_gradient_is_left_alone():
    matrix = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([matrix], lr=0.1, weight_decay=0.5, momentum=0.9)
    optimizer.step()
    assert matrix.eq(1).all()
    assert not optimizer.state
