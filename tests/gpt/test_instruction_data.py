"""Conversations as training data: every response is learnt, and nothing else."""

import pytest
import torch

from gpt.data import IGNORED, InstructionDataset, take

END = 0
TURNS = [([1, 2], [3]), ([4, 5, 6], [7, 8]), ([9], [])]


def pairs(dataset, index=0):
    """The inputs of a record and what each is to be followed by, None where nothing is learnt."""
    inputs, targets = dataset[index]
    return inputs.tolist(), [None if i == IGNORED else i for i in targets.tolist()]


def test_every_response_of_a_conversation_is_learnt_with_its_end():
    assert pairs(InstructionDataset.of_turns([TURNS], end=END)) == (
        [1, 2, 3, END, 4, 5, 6, 7, 8, END, 9],
        [None, 3, END, None, None, None, 7, 8, END, None, END],
    )


def test_without_the_mask_every_token_of_a_conversation_is_learnt():
    inputs, targets = pairs(InstructionDataset.of_turns([TURNS], end=END, mask_prompt=False))
    assert targets == [*inputs[1:], END]


@pytest.mark.parametrize("max_length", range(1, 12))
def test_a_long_conversation_keeps_its_beginning(max_length):
    inputs, targets = pairs(InstructionDataset.of_turns([TURNS], end=END))
    cut = InstructionDataset.of_turns([TURNS], end=END, max_length=max_length)
    assert pairs(cut) == (inputs[:max_length], targets[:max_length])
    assert cut.lengths.tolist() == [max_length]


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_conversation_of_one_turn_is_a_prompt_and_its_response(mask_prompt):
    prompts, responses = [[1, 2], [], [3], []], [[4], [5, 6], [], []]
    options = {"end": END, "mask_prompt": mask_prompt, "max_length": 3}
    plain = InstructionDataset(prompts, responses, **options)
    turns = [[turn] for turn in zip(prompts, responses, strict=True)]
    other = InstructionDataset.of_turns(turns, **options)
    assert len(plain) == len(other) == 4
    for index in range(4):
        assert pairs(plain, index) == pairs(other, index)
    assert plain.lengths.tolist() == other.lengths.tolist() == [3, 2, 1, 0]
    assert [tensor.dtype for tensor in plain[3]] == [torch.int64] * 2
    batch = take(other, [0, 1])
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
