"""What is estimated is what then comes: counts exactly, memory and time within bounds."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from gpt.base.errors import InputError
from gpt.base.events import Metrics, Text
from gpt.base.files import sha256_of
from gpt.model.config import GPTConfig
from gpt.model.model import GPT
from gpt.model.weights import save_model
from gpt.prompts import TEMPLATES
from gpt.text.records import RawFile, write_sources
from gpt.tokens.tokenizer import byte_tokenizer
from gpt.tune.lora import IN_BLOCKS, LoraParams
from pipeline.estimate import estimate, probe
from pipeline.estimate.estimate import make_plan
from pipeline.estimate.probe import Evaluation, Probe, Step
from pipeline.project.params import load_params
from pipeline.project.stage_table import STAGES
from stages.tokenize import TokenizeParams, tokenize

ROOT = Path(__file__).resolve().parents[3]
TRAINING = ("pretrain", "finetune_classifier", "finetune_instruct", "tune_preferences")


def raw(folder, kind, format_, text):
    folder.mkdir(parents=True)
    path = folder / f"{kind}.data"
    path.write_text(text)
    file = RawFile(
        name=kind,
        file=path.name,
        kind=kind,
        format=format_,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )
    write_sources(folder, [file])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A project of tiny models with all that the stages read that train; it is only read."""
    root = tmp_path_factory.mktemp("tiny") / "project"
    corpus = "".join(
        json.dumps({"text": f"Document {i} tells of cats. "}) + "\n" for i in range(99)
    )
    raw(root / "data/raw/corpus", "documents", "jsonl", corpus)
    messages = [f"{'spam' if i % 2 else 'ham'}\tit is {'so ' * (i % 7)} {i}\n" for i in range(80)]
    raw(root / "data/raw/messages", "messages", "tsv", "".join(messages))
    records = [
        {
            "instruction": f"Say {i}.",
            "input": "now " * (i % 3),
            "output": f"It is {i}.",
            "chosen": f"It is {i}." + " Gladly." * (i % 4),
            "rejected": f"{i}" * (i % 3) + ", dolt",
        }
        for i in range(40)
    ]
    raw(root / "data/raw/instructions", "instructions", "json", json.dumps(records))
    tokenize(
        TokenizeParams(tokenizer="bytes", validation=0.2),
        corpus=root / "data/raw/corpus",
        vocabulary=None,
        out=root / "data/tokens",
        metrics=root / "reports/tokenize/metrics.json",
        report=root / "reports/tokenize/corpus.json",
    )
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=257, context_length=256, n_layer=2, n_head=2, n_embd=32)
    save_model(GPT(config), root / "models/pretrain", tokenizer=byte_tokenizer())
    split = {"train": 0.6, "validation": 0.2, "seed": 3}
    training = {"base": "pretrain", "split": split, "max_length": 256}
    extra = {**TEMPLATES["phi3"].files, "training.json": training}
    save_model(GPT(config), root / "models/assistant", tokenizer=byte_tokenizer(), extra=extra)
    for file in ("dvc.yaml", "optional/dvc.yaml", ".dvcignore"):
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text((ROOT / file).read_text())
    (root / "presets").mkdir()
    params = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    for stage in TRAINING:
        params[stage]["train"] |= {"steps": 12, "eval_interval": 5}
    params["finetune_classifier"]["max_length"] = 20
    params["pretrain"]["model"] = {"context_length": 32, "n_layer": 1, "n_head": 2, "n_embd": 32}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "presets" / "other.yaml").write_text(yaml.safe_dump(params))
    return root


def changed(root, stage, **values):
    """The parameters with some of a stage's, or of its recipe's, replaced."""
    params = load_params(root / "params.yaml")
    section = getattr(params, stage)
    own = {name: value for name, value in values.items() if hasattr(section, name)}
    recipe = {name: value for name, value in values.items() if name not in own}
    section = replace(section, **own, train=replace(section.train, **recipe))
    return replace(params, **{stage: section})


def run(root, out, stage, params):
    """The stage itself; its history."""
    spec, own = STAGES[stage], getattr(params, stage)
    spec.load()(
        own,
        **{keyword: root / path for keyword, path in spec.input_paths(own).items()},
        **{keyword: out / path for keyword, path in spec.outputs.items()},
    )
    return np.genfromtxt(out / spec.outputs["history"], delimiter=",", names=True)


def shown(root, *arguments, **options):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    estimate.estimate(root, *arguments, console=console, **options)
    return console.file.getvalue()


# --- how much there is to do ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {"stride": 5, "accumulation": 2}),
        ("pretrain", {"windows": "random", "separate_documents": True}),
        ("pretrain", {"windows": "random", "steps": None, "epochs": 3, "accumulation": 2}),
        ("pretrain", {"steps": None, "epochs": 1, "batch_size": 1000}),
        ("finetune_classifier", {"trainable": "all"}),
        ("finetune_classifier", {"trainable": "last_block", "group_by_length": True}),
        ("finetune_classifier", {"trainable": "head", "max_length": None}),
        ("finetune_classifier", {"trainable": "last_blocks", "blocks": 2, "pooling": "mean"}),
        ("finetune_classifier", {"trainable": "head", "pooling": "mean"}),
        ("finetune_classifier", {"trainable": "lora", "lora": LoraParams(rank=2)}),
        ("finetune_instruct", {"steps": None, "epochs": 2}),
        ("finetune_instruct", {"max_length": 30, "mask_prompt": False, "group_by_length": True}),
        ("finetune_instruct", {"rows": "padded", "accumulation": 2}),
        ("finetune_instruct", {"trainable": "lora", "lora": LoraParams(rank=2, layers=IN_BLOCKS)}),
        ("tune_preferences", {"trainable": "all", "lora": None}),
        ("tune_preferences", {"group_by_length": True, "max_length": 40, "batch_size": 3}),
    ],
)
def test_steps_tokens_and_evaluations_are_those_of_the_stage(tiny, tmp_path, stage, changes):
    params = changed(tiny, stage, **changes)
    plan = make_plan(stage, params, tiny)
    history = run(tiny, tmp_path, stage, params)
    assert plan.steps == history["step"].flat[-1]
    if changes.get("trainable") != "head" or changes.get("pooling") == "mean":
        assert plan.tokens == history["tokens"].flat[-1]  # the stage counts a text's one vector
    assert plan.evaluations == history.size
    assert len(plan.step_flops) == plan.steps
    model = GPTConfig(vocab_size=257, context_length=256, n_layer=2, n_head=2, n_embd=32)
    if stage == "finetune_instruct":
        adapters = plan.trained if params.finetune_instruct.trainable == "lora" else 0
        assert plan.parameters == GPT(model).n_params + adapters
    if stage in ("finetune_instruct", "tune_preferences"):
        figures = json.loads((tmp_path / STAGES[stage].outputs["metrics"]).read_text())
        assert plan.trained == figures["parameters_trained"]


def test_a_pair_is_two_rows_and_its_adapters_are_counted(tiny):
    plan = make_plan("tune_preferences", load_params(tiny / "params.yaml"), tiny)
    assert plan.largest().rows == 16
    assert plan.largest().tokens <= plan.largest().positions
    everything = make_plan(
        "tune_preferences", changed(tiny, "tune_preferences", trainable="all", lora=None), tiny
    )
    assert plan.trained < everything.trained < plan.parameters
    assert everything.trained == everything.parameters
    assert 0.5 < plan.step_flops.sum() / everything.step_flops.sum() < 0.8
    # before the first step all pairs are asked of the reference, and two parts scored
    assert plan.flops_before > plan.final_flops > plan.evaluation_flops > 0


def test_a_plan_reads_no_weights(tiny, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(tiny, root)
    for weights in root.glob("models/*/model.safetensors"):
        weights.unlink()
    for stage in TRAINING:
        plan, here = (
            make_plan(stage, load_params(tiny / "params.yaml"), at) for at in (root, tiny)
        )
        assert (plan.flops, plan.largest()) == (here.flops, here.largest())


@pytest.mark.parametrize(
    ("stage", "changes", "has"),
    [
        ("finetune_classifier", {"trainable": "last_blocks", "blocks": 3}, "the base has 2"),
        (
            "finetune_instruct",
            {"trainable": "lora", "lora": LoraParams(layers=IN_BLOCKS, blocks=3)},
            "the model has 2",
        ),
    ],
)
def test_more_blocks_than_the_base_has_are_refused_as_the_stage_does(tiny, stage, changes, has):
    complaint = rf"blocks: 3 blocks are to be .*, {has}; use at most that$"
    with pytest.raises(InputError, match=complaint):
        make_plan(stage, changed(tiny, stage, **changes), tiny)


def test_a_preset_without_an_optional_section_says_so(tiny, tmp_path):
    params = yaml.safe_load((tiny / "params.yaml").read_text())
    del params["tune_preferences"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(InputError, match=r"^params\.yaml: tune_preferences: missing, and tune_"):
        make_plan("tune_preferences", load_params(tmp_path / "params.yaml"), tiny)


def test_the_frozen_blocks_are_counted_once_where_their_vectors_are_kept(tiny, monkeypatch):
    params = changed(tiny, "finetune_classifier", trainable="last_block")
    kept = make_plan("finetune_classifier", params, tiny)
    monkeypatch.setattr("stages.finetune_classifier._KEPT_BYTES", 0)
    anew = make_plan("finetune_classifier", params, tiny)
    assert kept.flops_before > 0 == anew.flops_before
    assert kept.step_flops.sum() < anew.step_flops.sum()
    memory = [plan.memory(plan.largest(), bf16=False, kernel="blocked") for plan in (kept, anew)]
    assert memory[0].features > 0 == memory[1].features
    assert memory[0].best < memory[1].best  # only what is trained is copied
    assert kept.trained == anew.trained < kept.parameters


# --- the time from what was seen ------------------------------------------------------------------


def test_the_whole_time_is_the_sum_of_what_was_seen(tiny):
    plan = make_plan("pretrain", load_params(tiny / "params.yaml"), tiny)
    # from 3 s on: a first step of 2 s, then 12 of 1 s; an evaluation of 4 s behind the fifth
    steps = [Step(1, 5.0, 2.0)]
    for number in range(2, 8):
        pause = 4.0 if number == 6 else 0.0
        steps.append(Step(number, steps[-1].end + pause + 1.0, 1.0))
    seen = Probe(steps=steps, evaluations=[Evaluation(1.0, 4.0)], finish=0.5)
    time = estimate.seconds(plan, seen)
    assert time["start"] == 3.0
    assert time["training"] == pytest.approx(13.0)
    assert time["evaluations"] == pytest.approx(3 * 4.0)  # at 5, 10 and 12 steps
    final = plan.final_flops / plan.evaluation_flops
    assert time["end"] == pytest.approx(final + 0.5)
    assert sum(time.values()) == pytest.approx(3 + 13 + 12 + final + 0.5)


def test_without_an_evaluation_it_is_taken_for_a_forward_pass(tiny):
    plan = make_plan("pretrain", load_params(tiny / "params.yaml"), tiny)
    seen = Probe(steps=[Step(1, 5.0, 2.0)])
    time = estimate.seconds(plan, seen)
    rate = 2.0 / plan.step_flops[0]
    assert time["evaluations"] == pytest.approx(3 * rate * plan.evaluation_flops)
    assert time["end"] == pytest.approx(rate * plan.final_flops)


def test_longer_batches_that_come_later_are_counted_longer(tiny):
    plan = make_plan("finetune_instruct", load_params(tiny / "params.yaml"), tiny)
    assert len(set(plan.step_flops)) > 1
    rate = 1e-9
    steps, end = [], 1.0
    for number in range(1, 8):
        took = rate * plan.step_flops[number - 1]
        end += took
        steps.append(Step(number, end, took))
    time = estimate.seconds(plan, Probe(steps=steps, evaluations=[Evaluation(0.0, 0.0)]))
    assert time["training"] == pytest.approx(rate * plan.step_flops.sum())


def test_events_become_steps_and_evaluations(monkeypatch):
    watch = probe.Watch(started=100.0)

    def hear(at, event):
        monkeypatch.setattr("time.time", lambda: 100 + at)
        watch(event)

    def step(number):
        values = {"train_loss": 1.0, "tokens": 10.0 * number, "tokens_per_second": 10.0}
        return Metrics(number, values)

    hear(5.0, step(1))
    hear(6.0, step(2))
    hear(8.0, Metrics(2, {"validation_loss": 1.0}))
    hear(9.0, Text("samples/a.txt", "a"))
    hear(11.0, step(3))
    hear(12.5, Metrics(3, {"validation_loss": 1.0}))
    assert watch.seen.start == 4.0
    assert [step.end for step in watch.seen.steps] == [5.0, 6.0, 11.0]
    assert watch.seen.evaluations == [Evaluation(2.0, 4.0), Evaluation(1.5, 1.5)]
    hear(13.0, Text("samples/a.txt", "b"))
    assert watch.seen.evaluations[1] == Evaluation(1.5, 2.0)


# --- the probe ------------------------------------------------------------------------------------


def test_the_table_has_every_stage_and_part_in_100_columns(tiny, monkeypatch):
    steps = [Step(number, number + 4.0, 1.0) for number in range(1, 13)]
    seen = Probe(steps=steps, evaluations=[Evaluation(1.0, 2.0)], peak=9 * 10**8)
    monkeypatch.setattr(estimate, "probe_stage", lambda *_: seen)
    measured = shown(tiny)
    lines = measured.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(stage in measured for stage in TRAINING)
    assert any(line.split() == ["steps", *["12"] * 4] for line in lines)
    assert any(line.split() == ["memory", *["900", "MB"] * 4] for line in lines)
    for part in ("weights", "gradients", "optimizer", "activations", "Python and libraries"):
        assert part in measured
    assert "its first steps" in measured


def test_a_busy_machine_is_said_to_be_busy(tiny, monkeypatch):
    seen = Probe(steps=[Step(1, 5.0, 1.0)], evaluations=[Evaluation(1.0, 2.0)], peak=10**9)
    monkeypatch.setattr(estimate, "probe_stage", lambda *_: seen)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (6.5, 1.0, 1.0))
    assert "The machine was busy (load 6.5 on 2 cores)" in shown(tiny, "pretrain")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert "busy" not in shown(tiny, "pretrain")


def test_a_probe_leaves_nothing_behind_and_says_what_the_stage_refuses(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    params = yaml.safe_load((tiny / "params.yaml").read_text())
    params["finetune_classifier"]["split"]["validation"] = 1e-6
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(params))
    with pytest.raises(InputError, match=r"the validation part of 80 messages is empty; add "):
        probe.probe_stage("finetune_classifier", tiny, file, 1000)
    assert list(tmp_path.iterdir()) == [file]


def test_a_probe_sees_steps_an_evaluation_and_the_memory(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a checkout of another commit: the code is the command's own
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    before = sorted(tiny.rglob("*"))
    seen = probe.probe_stage("finetune_classifier", tiny, tiny / "params.yaml", 1000)
    assert sorted(tiny.rglob("*")) == before, "something was written into the project"
    # all of them: twelve steps are less than it would look at
    assert [step.number for step in seen.steps] == list(range(1, 13))
    assert len(seen.evaluations) == 3
    assert 100e6 < seen.peak < 3e9
    assert seen.start > 0.5
    assert seen.finish > 0


def test_an_evaluation_comes_soon_and_the_rest_of_the_recipe_stays(tiny):
    own = load_params(tiny / "params.yaml").pretrain
    assert probe.shortened(own).train == replace(own.train, eval_interval=5)
    later = replace(own, train=replace(own.train, eval_interval=100))
    assert probe.shortened(later).train == replace(own.train, eval_interval=6)


# --- what a person asks ---------------------------------------------------------------------------


def test_on_a_named_device_nothing_is_measured_and_the_assumption_is_said(tiny, monkeypatch):
    monkeypatch.setattr(estimate, "probe_stage", None)
    text = shown(tiny, device="h100")
    assert "H100 SXM: 85.9 GB, 989.4 TFLOP/s in bf16" in text
    assert "35% of the peak is reached is assumed" in text
    assert "https://www.nvidia.com" in text
    assert "1 device" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "no bf16" in shown(tiny, "pretrain", device="t4")


def test_a_model_too_large_for_one_device_is_said_to_need_more(tiny):
    params = changed(tiny, "pretrain", batch_size=1)
    plan = make_plan("pretrain", params, tiny)
    from gpt.estimate import ACCELERATORS, Counts, Shape, lm_memory
    from gpt.model.config import GPT2_SIZES

    with torch.device("meta"):
        counts = Counts(GPT(GPT2_SIZES["1558M"]))
    large = replace(
        plan,
        memory=lambda shape, bf16, kernel: lm_memory(
            counts, Shape.full(1, 1024), train=plan.train, bf16=bf16, kernel=kernel
        ),
    )
    assert estimate.on_device(large, ACCELERATORS["rtx-3060"]).devices > 1
    assert estimate.on_device(large, ACCELERATORS["h100"]).devices == 1


def test_a_preset_is_estimated_with_the_data_that_is_there(tiny):
    text = shown(tiny, "pretrain", preset="other", device="l4")
    assert "presets/other.yaml, and data and base models as they are" in " ".join(text.split())


def test_json_holds_the_figures(tiny, capsys):
    estimate.estimate(tiny, "pretrain", device="a100-40", as_json=True)
    figures = json.loads(capsys.readouterr().out)
    stage = figures["stages"]["pretrain"]
    plan = make_plan("pretrain", load_params(tiny / "params.yaml"), tiny)
    assert stage["tokens"] == plan.tokens == 12 * 8 * 32
    assert stage["flops"] == plan.flops
    memory = stage["memory_bytes"]
    parts = sum(v for k, v in memory.items() if k not in ("peak", "device_peak"))
    assert memory["peak"] == parts
    assert (figures["device"], stage["devices"]) == ("a100-40", 1)


def test_stages_without_data_are_named_and_the_others_shown(tiny, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(tiny, root)
    shutil.rmtree(root / "models")
    text = " ".join(shown(root, device="l4").split())
    assert "models/pretrain is missing, and finetune_instruct begins with it; `gpt" in text
    assert "`gpt-pipeline run pretrain` makes it" in text
    shutil.rmtree(root / "data")
    with pytest.raises(InputError, match=r"^data/tokens is missing.*`gpt-pipeline run tokenize`"):
        estimate.estimate(root, device="l4")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("pretrian",), "pretrian: no such stage; use one of pretrain, finetune_classifier, "),
        (("tokenize",), "tokenize: trains nothing; use one of pretrain, "),
        (("--device", "h1000"), "--device h1000: not known; use one of rtx-3060, "),
        (("--preset", "nope"), "nope: no such preset; there are other"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_right_ones(tiny, arguments, complaint):
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", "estimate", *arguments],
        cwd=tiny,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {complaint}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# --- the bars -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINING)
def test_memory_and_time_are_near_those_of_the_real_run(tiny, tmp_path, stage):
    root = tmp_path / "project"
    shutil.copytree(tiny, root)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["pretrain"]["model"] = {"context_length": 64, "n_layer": 3, "n_head": 4, "n_embd": 128}
    for name in TRAINING:
        params[name]["train"] |= {"steps": 300, "eval_interval": 60}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    for folder in ("gpt", "stages", "pipeline"):  # the fingerprint of a state reads the code
        (root / folder).symlink_to(ROOT / folder)
    program = (
        "import sys; from pipeline.estimate.probe import peak_memory;"
        "from pipeline.run.stage import run_stage;"
        "from pathlib import Path; code = run_stage(sys.argv[1], Path.cwd());"
        "print('peak', peak_memory()); sys.exit(code)"
    )
    for _ in range(3):  # others may use the machine, too, in one of the two and not in the other
        result = estimate.estimate(root, stage, console=Console(file=io.StringIO()))[stage]
        started = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-c", program, stage],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        took = time.monotonic() - started
        peak = int(ran.stdout.split("peak ")[-1].split()[0])
        assert result.peak == pytest.approx(peak, rel=0.15)
        # the first run makes the database
        if took / 1.5 - 5 < result.total_seconds < took * 1.5:
            return
    pytest.fail(f"it took {took:.1f} s, and {result.total_seconds:.1f} s were expected")
