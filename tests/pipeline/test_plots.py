"""Pictures of a training: one a measure that its history has."""

from pathlib import Path

import pytest

from pipeline.plots import draw_curves

HISTORIES = {
    "pretrain": ("validation_loss", []),
    "finetune_classifier": ("validation_loss,validation_accuracy", ["accuracy"]),
    "tune_preferences": (
        "validation_loss,validation_reward_margin,validation_reward_accuracy,"
        "validation_reward_chosen,validation_reward_rejected",
        ["reward_margin", "reward_accuracy", "rewards"],
    ),
}


@pytest.mark.parametrize("stage", HISTORIES)
def test_every_measure_of_a_history_has_its_picture(tmp_path: Path, stage: str) -> None:
    columns, more = HISTORIES[stage]
    header = f"step,train_loss,learning_rate,{columns}"
    rows = [",".join(str(step * i) for i in range(header.count(",") + 1)) for step in (1, 2)]
    (tmp_path / "history.csv").write_text("\n".join([header, *rows]) + "\n")
    pictures = draw_curves(tmp_path / "history.csv", stage, tmp_path)
    assert [path.stem for path in pictures] == ["loss", *more, "learning_rate"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
