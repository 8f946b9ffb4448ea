"""Conversations as training data: every response is learnt and nothing else, packed or padded."""

import random

import pytest
import torch

from gpt.batches.data import IGNORED, InstructionDataset, batches, take
from gpt.batches.metrics import lm_loss_sum, mean_loss
from gpt.model.config import GPTConfig
from gpt.model.model import GPT

END = 0
TURNS = [([1, 2], [3]), ([4, 5, 6], [7, 8]), ([9], [])]


def pairs(dataset, index=0):
    """The inputs of a record and what each is to be followed by, None where nothing is learnt."""
    inputs, targets = dataset[index]
    return inputs.tolist(), [None if i == IGNORED else i for i in targets.tolist()]


def test_every_response_of_a_conversation_is_learnt_with_its_end():
    assert pairs(InstructionDataset([TURNS], end=END)) == (
        [1, 2, 3, END, 4, 5, 6, 7, 8, END, 9],
        [None, 3, END, None, None, None, 7, 8, END, None, END],
    )


def test_without_the_mask_every_token_of_a_conversation_is_learnt():
    inputs, targets = pairs(InstructionDataset([TURNS], end=END, mask_prompt=False))
    assert targets == [*inputs[1:], END]


@pytest.mark.parametrize("max_length", range(1, 12))
def test_a_long_conversation_keeps_its_beginning(max_length):
    inputs, targets = pairs(InstructionDataset([TURNS], end=END))
    cut = InstructionDataset([TURNS], end=END, max_length=max_length)
    assert pairs(cut) == (inputs[:max_length], targets[:max_length])
    assert cut.lengths.tolist() == [max_length]


# --- packed rows ----------------------------------------------------------------------------------

CONTEXT = 40
OPENING = [7, 8, 9]


def records(n=13, opening=OPENING, seed=0):
    """Of one to three turns, of many lengths, the template's words before each."""
    draw = random.Random(seed)

    def ids():
        return [draw.randrange(10, 50) for _ in range(draw.randrange(1, 9))]

    return [
        [([*opening, *ids()], ids()), *(([*ids()], ids()) for _ in range(i % 3))] for i in range(n)
    ]


def dataset(rows, conversations=None, **options):
    return InstructionDataset(
        conversations or records(),
        end=END,
        **{"max_length": CONTEXT, "row_length": CONTEXT if rows == "packed" else None, **options},
    )


@pytest.fixture
def model():
    torch.manual_seed(2)
    return GPT(
        GPTConfig(vocab_size=64, context_length=CONTEXT, n_layer=2, n_head=2, n_embd=16)
    ).eval()


def loss_and_gradients(model, batch):
    loss, n = lm_loss_sum(model, batch)
    return loss, n, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("opening", [OPENING, []], ids=["one opening", "none"])
@pytest.mark.parametrize("max_length", [CONTEXT, 11, 3, 2])
def test_packed_records_give_the_loss_and_the_gradients_of_padded_ones(
    model, mask_prompt, opening, max_length
):
    options = {"mask_prompt": mask_prompt, "max_length": max_length}
    batch = {
        rows: take(dataset(rows, records(opening=opening), **options), range(13))
        for rows in ("padded", "packed")
    }
    assert len(batch["packed"].inputs) < len(batch["padded"].inputs) == 13
    packed, padded = (loss_and_gradients(model, batch[rows]) for rows in ("packed", "padded"))
    assert packed[1] == padded[1]
    assert torch.allclose(packed[0], padded[0], rtol=1e-5)
    for ours, theirs in zip(packed[2], padded[2], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_token_attends_into_another_record(model):
    """Whatever the others say, the losses of a record are the same to the bit."""
    one = records()
    for changed in range(len(one)):
        other = list(one)
        other[changed] = [
            (
                prompt[: len(OPENING)] + [i + 1 for i in prompt[len(OPENING) :]],
                [i + 1 for i in response],
            )
            for prompt, response in one[changed]
        ]
        before, after = (hidden_of_each(model, conversations) for conversations in (one, other))
        for index in range(len(one)):
            assert torch.equal(before[index], after[index]) == (index != changed)


def hidden_of_each(model, conversations):
    """What the model makes of each record's own tokens, from the rows that they are packed in."""
    data = dataset("packed", conversations)
    batch = take(data, range(len(conversations)))
    hidden = model.hidden(batch.inputs, documents=batch.documents)
    shared = int((batch.documents[0] < 0).sum())
    assert shared == len(OPENING)
    found = {}
    for row, numbers in zip(range(len(hidden)), batch.documents, strict=True):
        for number in numbers[numbers >= 0].unique().tolist():
            place = numbers == number
            own = batch.targets[row][place].tolist()
            matches = [
                i
                for i in range(len(data))
                if data[i][1][shared:].tolist() == own and i not in found
            ]
            if matches:  # padding matches none
                found[matches[0]] = hidden[row][place]
    assert len(found) == len(conversations)
    return found


def test_rows_are_filled_with_whole_records():
    """Each once, behind the opening, in rows that the context holds and padding hardly widens."""
    data = dataset("packed", records(60))
    batch = take(data, range(60))
    T = batch.inputs.shape[1]
    assert T <= CONTEXT
    assert batch.n_tokens > 0.85 * batch.inputs.numel()
    assert (batch.inputs[:, :3] == torch.tensor(OPENING)).all()
    assert (batch.documents[:, :3] == -1).all()
    found = []
    for inputs, targets, numbers in zip(batch.inputs, batch.targets, batch.documents, strict=True):
        assert (targets[:3] == IGNORED).all()
        for number in numbers[3:].unique_consecutive().tolist():
            place = numbers == number
            if number < 60:
                found.append((OPENING + inputs[place].tolist(), targets[place].tolist()))
            else:
                assert (targets[place] == IGNORED).all()
    expected = [(data[i][0].tolist(), data[i][1][3:].tolist()) for i in range(60)]
    assert sorted(found) == sorted(expected)


def test_what_is_learnt_is_never_shared():
    """Without the mask the opening is learnt, from each record for itself."""
    batch = take(dataset("packed", mask_prompt=False), range(4))
    assert (batch.documents >= 0).all()
    batch = take(dataset("packed", [[(OPENING, [10, 11])], [(OPENING, [10, 12])]]), [0, 1])
    # the opening's last token predicts the responses
    assert (batch.documents < 0).sum().item() == 2


def test_only_what_records_begin_with_is_shared():
    batch = take(dataset("packed", [[([7, 8, 20, 9, 5], [1])], [([7, 8, 21, 9, 5], [1])]]), [0, 1])
    assert batch.inputs.tolist() == [[7, 8, 20, 9, 5, 1, 21, 9, 5, 1]]
    assert batch.documents.tolist() == [[-1, -1, 0, 0, 0, 0, 1, 1, 1, 1]]


def test_a_record_alone_and_one_that_fills_its_row_are_packed_too(model):
    long = [(OPENING, list(range(10, 60)))]
    for conversations in ([records(1)[0]], [long], [long, *records(3), long]):
        losses = [
            mean_loss(model, batches(dataset(rows, conversations), 8))
            for rows in ("packed", "padded")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
