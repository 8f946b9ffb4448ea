"""Attention in blocks is attention: its values, its gradients, its dropout."""

import pytest
import torch
from torch.nn import functional as F

from gpt.model import attention
from gpt.model.attention import BlockedAttention, Documents, causal_attention, heads


def _plain(qkv: torch.Tensor, n_head: int, documents: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = heads(qkv, 3, n_head)
    if documents is not None:  # a document at a time
        return torch.stack(
            [
                torch.cat([_document(row, ids, n, n_head) for n in ids.unique_consecutive()])
                for row, ids in zip(qkv, documents, strict=True)
            ]
        )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _document(row: torch.Tensor, ids: torch.Tensor, number: int, n_head: int) -> torch.Tensor:
    """What a document sees, with the row's opening before it and nothing else."""
    alone = _plain(row[None, (ids < 0) | (ids == number)], n_head)[0]
    return alone if number < 0 else alone[int((ids < 0).sum()) :]


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str
)
def test_values_and_gradients_are_those_of_the_fused_kernel(length, dtype, tolerance):
    torch.manual_seed(0)
    qkv = torch.randn(2, length, 3 * 24, dtype=dtype, requires_grad=True)
    up = torch.randn(2, length, 24, dtype=dtype)
    ours, theirs = causal_attention(qkv, 3), _plain(qkv, 3)
    assert ours.grad_fn.name().startswith("BlockedAttention")
    assert torch.allclose(ours, theirs, atol=tolerance)
    (our_gradient,) = torch.autograd.grad(ours, qkv, up)
    (their_gradient,) = torch.autograd.grad(theirs, qkv, up)
    assert torch.allclose(our_gradient, their_gradient, atol=3 * tolerance)


def _documents(length: int, opening: int, whole: bool) -> torch.Tensor:
    """Rows of documents of some 20 positions and of some 50, behind an opening of so many and of
    one less; and of one `whole` document, for which no key can be left out."""
    places = torch.arange(length)
    rows = [(places * 13 % 20 == 7).cumsum(0), places // 50]
    for before, row in enumerate(rows):
        row[: max(0, opening - before)] = -1
    return torch.stack([*rows, torch.full((length,), 9)] if whole else rows)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("opening", [0, 4, 70])
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str
)
def test_documents_of_a_row_are_as_if_each_were_alone(length, dtype, tolerance, opening, whole):
    """In blocks, their gradients too, and in the fused kernel."""
    torch.manual_seed(3)
    documents = _documents(length, opening, whole)
    n = len(documents)
    qkv = torch.randn(n, length, 3 * 24, dtype=dtype, requires_grad=True)
    up = torch.randn(n, length, 24, dtype=dtype)
    ours, alone = (
        causal_attention(qkv, 3, documents=Documents(documents)),
        _plain(qkv, 3, documents),
    )
    assert ours.grad_fn.name().startswith("BlockedAttention")
    assert torch.allclose(ours, alone, atol=tolerance)
    with torch.no_grad():
        assert torch.allclose(
            causal_attention(qkv, 3, documents=Documents(documents)), alone, atol=tolerance
        )
    (our_gradient,) = torch.autograd.grad(ours, qkv, up)
    (their_gradient,) = torch.autograd.grad(alone, qkv, up)
    assert torch.allclose(our_gradient, their_gradient, atol=3 * tolerance)


@pytest.mark.parametrize(
    "documents",
    [
        None,
        [[0, 0, 1, 1, 1, 1, 2, 2], [5] * 8],
        [[-1, 0, 0, 0, 1, 1, 2, 2], [-1, -1, 0, 0, 0, 3, 3, 3]],
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_is_that_of_the_function(monkeypatch, dropout, documents):
    """By finite differences, in several blocks and with the same dropout at every call."""
    monkeypatch.setattr(attention, "BLOCK", 3)
    monkeypatch.setattr(attention, "DOCUMENT_BLOCK", 3)
    apart = documents and Documents(torch.tensor(documents))
    torch.manual_seed(1)
    qkv = torch.randn(2, 8, 12, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return BlockedAttention.apply(x, 2, dropout, apart)

    assert torch.autograd.gradcheck(function, qkv)


@pytest.mark.parametrize(
    ("opening", "keys"),
    [
        (0, [[range(64)], [range(50, 128)], [range(100, 150)]]),
        (4, [[range(64)], [range(4), range(50, 128)], [range(4), range(100, 150)]]),
        (70, [[range(64)], [range(128)], [range(70), range(100, 150)]]),
    ],
)
def test_keys_that_no_query_of_a_block_sees_are_left_out(opening, keys):
    blocks = Documents(_documents(150, opening, whole=False)).blocks(torch.float32)
    assert [[range(each.start, each.stop) for each in block.keys] for block in blocks] == keys


def test_half_precision_learns_with_dropout_too():
    torch.manual_seed(4)
    qkv = torch.randn(2, 200, 72, requires_grad=True)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(5)
        y = causal_attention(qkv.to(dtype), 3, 0.3)
        gradients.append(torch.autograd.grad(y.float().square().sum(), qkv)[0])
    one, other = gradients
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99


def test_dropout_drops_that_share_and_keeps_the_mean():
    torch.manual_seed(2)
    qkv = torch.randn(4, 64, 3 * 16, requires_grad=True)
    plain = causal_attention(qkv, 2).detach()
    dropped = torch.stack([causal_attention(qkv, 2, 0.3).detach() for _ in range(300)])
    assert not torch.allclose(dropped[0], dropped[1])
    assert (dropped.mean(0) - plain).abs().mean() < 0.03
    # the first position sees one key: kept and scaled, or dropped
    shares = (dropped[:, :, 0] == 0).float().mean()
    assert abs(shares.item() - 0.3) < 0.03


def test_without_gradients_the_fused_kernel_is_used(monkeypatch):
    def forbidden(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(BlockedAttention, "apply", forbidden)
    with torch.no_grad():
        qkv = torch.randn(1, 4, 12)
        assert torch.equal(causal_attention(qkv, 2), _plain(qkv, 2))
