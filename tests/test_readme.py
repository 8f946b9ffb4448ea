"""What README says to paste works as it stands there."""

import json
import re
import shutil
from pathlib import Path

import yaml

from pipeline.project.params import load_params, section
from stages.download import download
from stages.tokenize import tokenize

ROOT = Path(__file__).parent.parent
RAW = ("corpus", "messages", "instructions", "gpt2")


def test_the_block_for_data_of_your_own_works_in_the_committed_parameters(tmp_path):
    said = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own data")[1]
    block = yaml.safe_load(re.search(r"```yaml\n(.*?)```", said, re.DOTALL)[1])
    whole = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, values in block.items():
        whole[name] |= values
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    params = load_params(tmp_path / "params.yaml")

    local = tmp_path / block["download"]["local"]
    assert f"`cp -r samples/gpt2-nano {local.name}/`" in said
    shutil.copytree(ROOT / "samples" / "gpt2-nano", local / "gpt2-nano")
    (local / "handbook" / "deep").mkdir(parents=True)
    pages = json.loads((ROOT / "samples" / "instructions.json").read_text(encoding="utf-8"))
    for i, page in enumerate(pages[:60]):
        text = f"{page['instruction']}\n{page['output']}\n" * 3
        (local / "handbook" / "deep" / f"{i}.md").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "samples" / "stories.txt", local)
    (local / "tickets.csv").write_text('queue,body\nIT,"no, it is off"\nHR,a day off\n')
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    (local / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")

    raw = {name: tmp_path / "raw" / name for name in RAW}
    found = download(
        section(params, "download"), local=local, **raw, metrics=tmp_path / "download.json"
    )
    assert (found["messages_rows"], found["instructions_records"]) == (2, 1)
    figures = tokenize(
        section(params, "tokenize"),
        corpus=raw["corpus"],
        vocabulary=raw["gpt2"],
        out=tmp_path / "tokens",
        metrics=tmp_path / "tokenize.json",
        report=tmp_path / "report.json",
    )
    assert figures["train_tokens"] > 10_000
