"""What `dvc.lock` records, and one that DVC did not write."""

import pytest

from gpt.base.errors import InputError
from pipeline.dag.lock import read_lock


@pytest.mark.parametrize(
    "entry", ["{deps: [foo]}", "{params: {params.yaml: }}", "{deps: 3}", "{outs: [{md5: a}]}", "3"]
)
def test_a_lock_that_dvc_did_not_write_is_one_line(tmp_path, entry):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  evaluate: {entry}\n")
    with pytest.raises(InputError, match=r"dvc\.lock: ") as caught:
        read_lock(tmp_path)
    assert "\n" not in str(caught.value)
