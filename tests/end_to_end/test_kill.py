"""Exact resume of the real thing, in short: `python -m tests.end_to_end.kill` is the long form."""

from dataclasses import replace

import pytest
import yaml

from tests.end_to_end.kill import Outcome, Scratch, compare, killed, prepare, small_params, straight

pytestmark = pytest.mark.slow

STAGES = ("pretrain", "finetune_classifier", "finetune_instruct", "tune_preferences")


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory) -> tuple[Scratch, Outcome]:
    """A project in which pretraining is next, and what it gives without interruption."""
    scratch = prepare(tmp_path_factory.mktemp("kill"), "pretrain", small_params(*STAGES, steps=60))
    return scratch, straight(scratch)


@pytest.fixture(scope="module", params=STAGES[1:])
def fine_tuning(request, pretraining) -> tuple[Scratch, Outcome]:
    """The same for a fine-tuning stage, on the model of the straight pretraining."""
    before, _ = pretraining
    scratch = Scratch(before.folder, request.param, before.folder / "straight-pretrain")
    return scratch, straight(scratch)


def test_pretraining_killed_in_training_and_at_every_point_of_its_end_is_as_if_never_stopped(
    pretraining,
):
    scratch, reference = pretraining
    for attempt in range(5):
        run = killed(scratch, f"killed-aimed-{attempt}", ["saved", "saved", "writing", "written"])
        assert run.problems == []
        assert compare(reference, run.outcome) == []
        # the writing takes milliseconds, through which who watches a busy machine may sleep
        if len(run.kills) == 4:
            break
    assert len(run.kills) == 4, run.outcome.output
    assert [kill.went_on for kill in run.kills] == [kill.saved for kill in run.kills]
    assert len(run.outcome.runs) == 1, "the kills left a state, and with it the MLflow run"


def test_pretraining_with_its_newest_state_damaged_goes_on_from_the_one_before(pretraining):
    scratch, reference = pretraining
    # half of the straight run's time is start-up or training, whatever the machine
    moments = ["saved", reference.seconds / 2]
    run = killed(scratch, "killed-damaged", moments, damage="flip")
    assert run.problems == []
    assert compare(reference, run.outcome) == []
    assert run.kills[0].damaged is not None, "the first kill came when a state had been saved"


def test_fine_tuning_that_is_killed_is_the_one_that_never_stopped(fine_tuning):
    scratch, reference = fine_tuning
    run = killed(scratch, f"killed-{scratch.stage}", ["saved"])
    assert run.problems == []
    assert compare(reference, run.outcome) == []
    assert run.kills[0].went_on == run.kills[0].saved is not None
    assert len(run.outcome.runs) == 1, "the kill left a state, and with it the MLflow run"


def test_the_comparison_finds_a_byte_a_leftover_and_a_value(pretraining):
    """A comparison that finds nothing anywhere would pass every test above."""
    _, reference = pretraining
    files = dict(reference.files)
    files["models/pretrain/model.safetensors"] = "0" * 64
    files[".checkpoints/pretrain/0123/step-00000001.pt"] = "0" * 64
    del files["reports/pretrain/history.csv"]
    curves = dict(reference.runs[0].curves)
    (step, value), *rest = curves["train_loss"]
    curves["train_loss"] = [(step, value + 1e-9), *rest, rest[-1]]
    runs = [replace(reference.runs[0], curves=curves)]
    found = "\n".join(compare(reference, replace(reference, files=files, runs=runs)))
    for what in (
        "model.safetensors has other bytes",
        "step-00000001.pt was left behind",
        "history.csv is missing",
        "train_loss is there more than once at step 61",
        "train_loss differs at step 1:",
    ):
        assert what in found, found


def test_the_built_in_parameters_have_everything_that_resuming_must_not_lose():
    for stage in STAGES:
        params = small_params(stage)
        assert params["pretrain"]["model"]["dropout"] > 0
        train = params[stage]["train"]
        assert train["accumulation"] > 1
        assert train["steps"] >= 4 * train["eval_interval"]
        assert yaml.safe_load(yaml.safe_dump(params)) == params
