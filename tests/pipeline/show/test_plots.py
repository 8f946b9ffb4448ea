"""Pictures of a training: one a measure that its history has."""

from pathlib import Path

import pytest

from pipeline.show.plots import draw_confusion, draw_curves, draw_scores

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


def test_the_learning_rate_and_other_parts_than_the_test_s_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("step,train_loss,validation_loss\n1,2,3\n")
    drawn = draw_curves(tmp_path / "history.csv", "pretrain", tmp_path, learning_rate=False)
    assert [path.name for path in drawn] == ["loss.png"]
    rows = [f"{part},a,a,1" for part in ("test", "validation")]
    confusion = tmp_path / "confusion.csv"
    confusion.write_text("\n".join(["part,actual,predicted,messages", *rows]) + "\n")
    drawn = draw_confusion(confusion, tmp_path, parts=["test"])
    assert [path.name for path in drawn] == ["confusion_matrix.png"]


def test_pairs_that_never_occurred_may_be_left_out_of_a_confusion(tmp_path: Path) -> None:
    pairs = {("a", "a"): 2, ("a", "b"): 0, ("b", "a"): 1, ("b", "b"): 0}
    drawn = []
    for name, least in (("square", 0), ("pairs", 1)):
        rows = [f"test,{a},{p},{n}" for (a, p), n in pairs.items() if n >= least]
        confusion = tmp_path / "confusion.csv"
        confusion.write_text("\n".join(["part,actual,predicted,messages", *rows]) + "\n")
        (picture,) = draw_confusion(confusion, tmp_path / name)
        drawn.append(picture.read_bytes())
    assert drawn[0] == drawn[1]


def test_scores_are_drawn_with_and_without_intervals_and_baseline(tmp_path: Path) -> None:
    scores = {"zero-shot": (0.51, None, None), "fine-tuned $x$": (0.98, 0.97, 1.0)}
    plain = draw_scores(tmp_path / "plain.png", "Who is right", scores, "accuracy")
    line = draw_scores(tmp_path / "line.png", "Who is right", scores, "accuracy", ("most", 0.5))
    assert plain.read_bytes().startswith(b"\x89PNG")
    assert line.read_bytes() != plain.read_bytes()
