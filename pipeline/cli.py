"""The command line: `gpt-pipeline`, also `python -m pipeline`.

Each command imports what it needs when it runs: `--help` loads no torch, `status` no Prefect.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from gpt.base.errors import InputError, RunError
from gpt.base.files import whole_file
from pipeline.project.processes import (
    collect_seldom,
    end_with_the_terminal,
    reach_loopback_directly,
)
from pipeline.show.markdown import name_of
from pipeline.show.terminal import say

if TYPE_CHECKING:
    from gpt.generation import Sampling


class _Commands(TyperGroup):
    """Says in one line what a person can do something about, with an exit code that tells how."""

    def invoke(self, ctx: Any) -> Any:
        try:
            for each in ctx.args:
                each.encode()
            return super().invoke(ctx)
        except (InputError, RunError) as error:
            code, line = 2 if isinstance(error, InputError) else 1, str(error)
        except KeyboardInterrupt as error:
            code, line = 128 + getattr(error, "signal", signal.SIGINT), "stopped"
        except BrokenPipeError:  # `gpt-pipeline status | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except UnicodeEncodeError as error:  # Python takes such bytes for halves of characters
            given = error.object.encode("utf-8", "surrogateescape")
            shown = given.decode("utf-8", "backslashreplace")[:80]
            code, line = 2, f"argument {shown}: not UTF-8; convert it, as `iconv -f latin1` does"
        except (MemoryError, RuntimeError, OSError) as error:
            from pipeline.project.secrets import without_secrets
            from pipeline.run.stage import system_fault

            code, line = 1, without_secrets(system_fault(error))
            if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                name = name_of(str(error.filename), 120)
                code, line = 2, f"{name}: {error.strerror}; name another"
            if not line:  # a mistake of ours: nothing is hidden
                raise
        say(f"error: {line}", file=sys.stderr)
        raise typer.Exit(code)


def _mend_streams() -> None:
    """What was closed before the start is empty; what a terminal cannot show is spelled out."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # its descriptor, too, else that of the next file to be opened
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))
        else:
            stream.reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")


app = typer.Typer(
    cls=_Commands,
    help="A GPT from raw text to a classifier and an assistant, every step reproducible.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Run the command line; the process ends with its exit code."""
    _mend_streams()
    collect_seldom()
    reach_loopback_directly()
    end_with_the_terminal()
    app(prog_name="gpt-pipeline")
    raise AssertionError("typer ends the process")


def _root() -> Path:
    from pipeline.dag.dvc_files import find_root

    return find_root(Path.cwd())


@app.command()
def run(
    stages: Annotated[
        list[str] | None,
        typer.Argument(metavar="STAGE", help="Only these and what they depend on."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run them even if unchanged.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="So many stages run at the same time.")] = 3,
) -> None:
    """Bring the pipeline up to date: what did not change is not run again."""
    root = _root()
    code = _run_flow(root, stages or [], force, jobs)
    if code:
        raise typer.Exit(code)
    if not stages:
        from pipeline.report.terminal import print_report

        print_report(root, always=False)


def _run_flow(root: Path, stages: list[str], force: bool, jobs: int) -> int:
    from pipeline.flow.prefect_api import prefect_told, use_api
    from pipeline.project.params import PARAMS_FILE, check_sections, check_stages, load_params
    from pipeline.tracking.kept_before import unsent
    from pipeline.tracking.outbox import outboxes

    check_stages(stages)
    check_sections(root / PARAMS_FILE)
    os.chdir(root)
    server = use_api(root)
    if outboxes(root) or unsent(root):
        from pipeline.tracking.sender import send_quietly

        for each in send_quietly(root):
            say(each.text)

    from pipeline.dag.graph import Dag

    dag = Dag(root)
    if force or any(dag.changes(dag.plan(stages)).values()):
        # A mistake in any section stops here, before any work. Where nothing changed since the
        # stages ran, their parameters are those that were found right then.
        load_params(root / PARAMS_FILE)

    from pipeline.flow.flow import READ, exit_code, gpt_pipeline

    READ.set(dag)
    if server:
        # what comes after the stages is read while the server starts, which takes longer

        server.wait()
    with prefect_told():
        return exit_code(gpt_pipeline(stages, force=force, jobs=jobs, return_state=True))


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A stage of dvc.yaml.")],
) -> None:
    """Execute one stage here and now, as DVC does; `run` is what you want."""
    from pipeline.project.params import check_stages

    root = _root()
    check_stages([name])
    from pipeline.run.stage import run_stage

    raise typer.Exit(run_stage(name, root))


@app.command()
def status(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every reason, metric and MLflow address.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON.")] = False,
) -> None:
    """The DAG: what is up to date, what would run, why, and what it would cost."""
    from pipeline.report.status import print_status

    os.environ.setdefault("DVC_NO_ANALYTICS", "true")
    print_status(_root(), verbose=verbose, as_json=as_json)


@app.command()
def preset(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The one to use.")] = None,
) -> None:
    """List the presets; or put one in place as params.yaml."""
    from pipeline.project.overrides import is_kept, write_params
    from pipeline.project.params import PARAMS_FILE, preset_file, preset_files

    root = _root()
    current = root / PARAMS_FILE
    now = current.read_bytes() if current.exists() else None
    if name is None:
        presets = preset_files(root)
        width = max(map(len, presets), default=0)
        for each, path in presets.items():
            text = path.read_bytes()
            comments = (line for line in text.decode().splitlines() if line.startswith("#"))
            mark = "*" if text == now else " "
            say(f"{mark} {each:<{width}}  {next(comments, '').strip('# ')}")
        return
    chosen = preset_file(root, name).read_bytes()
    if now is not None and not is_kept(root):
        kept = root / "presets" / "replaced.yaml"
        if kept.exists():
            raise InputError(
                f"{PARAMS_FILE}: holds edits that are kept nowhere else; commit them, or copy the "
                "file into presets/, and try again"
            )
        with whole_file(kept) as partial:
            partial.write_bytes(now)
        say(f"what was in {PARAMS_FILE} is now the preset `replaced`")
    write_params(root, chosen)
    say(f"{PARAMS_FILE} is now presets/{name}.yaml; `gpt-pipeline status` says what would run")


@app.command()
def estimate(
    stage: Annotated[
        str | None, typer.Argument(metavar="STAGE", help="Only this one of those that train.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="With the parameters of this preset.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="On this graphics card: h100, rtx-3060, …")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON.")] = False,
) -> None:
    """What training will take: memory and time, measured in its first steps or for a device."""
    from pipeline.estimate.estimate import estimate as show

    show(_root(), stage, preset=preset, device=device, as_json=as_json)


@app.command("probe", hidden=True)
def measure(
    stage: str, root: Path, params: Path, scratch: Path, weights: int, started: float
) -> None:
    """What `estimate` starts for each stage, to measure it."""
    from pipeline.estimate.probe import become_probe

    become_probe(stage, root, params, scratch, weights, started)


@app.command()
def ablate(
    table: Annotated[Path, typer.Argument(help="The rows: YAML, as ablations/sms.yaml.")],
    jobs: Annotated[int, typer.Option(min=1, help="So many rows at the same time.")] = 1,
) -> None:
    """Train the classifier once for each row of a table, and compare the scores: a sweep."""
    from pipeline.sweep.command import run_sweep

    raise typer.Exit(run_sweep(_root(), table, jobs=jobs))


@app.command()
def ui() -> None:
    """Serve MLflow's and Prefect's pages on this machine until Ctrl-C."""
    from pipeline.flow.ui import serve

    serve(_root())


@app.command()
def promote(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Make this one the champion by hand.")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(min=1, help="Which version of it; by default the candidate, the newest."),
    ] = None,
) -> None:
    """Compare the evaluated models with the champions by the rule in params.yaml; or, with MODEL,
    make a version the champion whatever its scores."""
    from pipeline.dag.graph import Dag
    from pipeline.project.params import PARAMS_FILE, load_params
    from pipeline.project.settings import PromotionParams
    from pipeline.verdict.promotion import promote_by_hand, promote_the_better

    root = _root()
    if model is not None:
        say(f"{model} version {promote_by_hand(root, model, version)} is the champion")
        return
    if version is not None:
        raise InputError("--version: of which model? name it: gpt-pipeline promote MODEL")
    if Dag(root).changes(["evaluate"])["evaluate"]:
        raise InputError(
            "evaluate is out of date, so what it wrote is of other models; run `gpt-pipeline run`"
        )
    params = load_params(root / PARAMS_FILE)
    rule = params.promotion or PromotionParams()
    for decision in promote_the_better(root, rule, params.evaluate):
        say(decision)


@app.command()
def judge() -> None:
    """Let another model, which params.yaml names, score the assistant's answers from 0 to 100."""
    from pipeline.project.file_locks import stage_lock
    from pipeline.project.params import PARAMS_FILE, load_params, section
    from pipeline.show.console import make_log
    from pipeline.verdict.judge import REPORT, judge_assistant, markdown

    root = _root()
    params = section(load_params(root / PARAMS_FILE), "judge")
    with stage_lock(root, "judge"), make_log("judge") as log:
        judged = judge_assistant(params, root, log)
    say(markdown(judged.summaries), end="")
    say(f"{judged.sent} requests sent, {judged.cached} replies from the cache")
    if failed := sum(each.failed for each in judged.summaries.values()):
        raise RunError(
            f"{failed} answers got no judgement, and {REPORT}/scores.csv says why; "
            "`gpt-pipeline judge` asks for these again"
        )


@app.command("lm-eval")
def lm_eval(
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASK…", help="Names of the harness, or YAML files.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="A model directory with a language model; else models/assistant."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many documents of each task.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the words of the model's own template.")
    ] = False,
    online: Annotated[
        bool, typer.Option("--online", help="Data may be fetched from Hugging Face.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the results go; else reports/lm-eval.")
    ] = None,
) -> None:
    """Measure a language model with EleutherAI's lm-evaluation-harness."""
    from pipeline.show.console import make_log
    from pipeline.verdict.lm_eval import HarnessParams, markdown, measure

    directory = _model(model, "assistant")
    if out is None:
        out = Path(os.path.relpath(_root() / "reports/lm-eval" / directory.resolve().name))
    params = HarnessParams(tasks=tuple(tasks), limit=limit, shots=shots, chat=chat, online=online)
    with make_log("lm-eval") as log:
        results = measure(params, model=directory, out=out, log=log)
    say(markdown(results), end="")


@app.command()
def report() -> None:
    """What the last run of every stage came to."""
    from pipeline.report.terminal import print_report

    print_report(_root())


@app.command()
def data() -> None:
    """What the models learn from: write reports/data.md anew, and say it in short."""
    from pipeline.data.report import print_data

    print_data(_root())


@app.command()
def clean(
    everything: Annotated[
        bool, typer.Option("--all", help="Those too that a run would go on from.")
    ] = False,
) -> None:
    """Remove states of stopped trainings that no run goes on from, and say what they took."""
    from pipeline.dag.repository import mend_rwlock
    from pipeline.project.stage_table import STAGES
    from pipeline.run.clean import Removed
    from pipeline.run.clean import clean as remove
    from pipeline.run.resume import size_in_words
    from pipeline.run.stage import next_states

    root = _root()
    sizes = []
    if mend_rwlock(root):
        say(".dvc/tmp/rwlock: cut off when DVC was killed")
        sizes.append(0)
    for each in remove(root, STAGES, None if everything else next_states(root)):
        say(each)
        if isinstance(each, Removed):
            sizes.append(each.size)
    say(f"{size_in_words(sum(sizes))} freed" if sizes else "nothing to remove")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A model directory.")],
    target: Annotated[Path, typer.Argument(help="The directory to write, or the GGUF file.")],
    format: Annotated[
        Literal["native", "gguf"],
        typer.Option(help="native is a model directory; gguf one file for llama.cpp."),
    ] = "native",
    dtype: Annotated[
        str | None, typer.Option(help="Of native: float32 (the default), float16 or bfloat16.")
    ] = None,
    type: Annotated[
        Literal["f16", "q8_0"] | None,
        typer.Option(help="Of gguf: half precision, or 8 bits (the default)."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Of gguf: measure the loss on this text (by default the samples')."),
    ] = None,
) -> None:
    """Write a model directory again: in another precision, or as GGUF."""
    from pipeline.use.export import export as write
    from pipeline.use.export import export_gguf

    if format == "native":
        if type is not None or text is not None:
            raise InputError("type, text: are GGUF's; add --format gguf, or use --dtype")
        dtype = dtype or "float32"
        say(f"{target}: {write(source, target, dtype) / 1e6:.1f} MB of {dtype} weights")
        return
    if dtype is not None:
        raise InputError("dtype: is a model directory's; of GGUF, --type says the precision")
    type = type or "q8_0"
    samples = Path("samples") / "stories.txt"
    text = text or (samples if samples.is_file() else None)
    size, loss = export_gguf(source, target, type, text)
    say(f"{target}: {size / 1e6:.1f} MB, {type}")
    if loss is not None:
        say(loss)


_ModelOption = Annotated[Path | None, typer.Option(help="A model directory.")]
_MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="The most tokens to write.")]
_MinNewTokensOption = Annotated[
    int, typer.Option(min=0, help="Before so many tokens nothing ends the answer.")
]
_TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="0 takes the likeliest token; 1 samples as the model says.")
]
_TopKOption = Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest only.")]
_TopPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample among this share of likelihood only.")
]
_RepetitionPenaltyOption = Annotated[
    float, typer.Option(help="Above 1 makes tokens that are there already less likely.")
]
_SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
_StopOption = Annotated[list[str] | None, typer.Option(help="Ends the answer; may be given often.")]
_PrecisionOption = Annotated[
    Literal["fp32", "bf16", "int8"],
    typer.Option(
        help="Of the weights: bf16 is about twice as fast and a little less exact, int8 up to "
        "twice as fast again, on the CPU and compiled."
    ),
]
_EngineOption = Annotated[
    Literal["auto", "plain", "compiled"],
    typer.Option(
        help="plain is PyTorch, compiled several times as fast on a CPU; auto compiles in the "
        "background and is plain until that is done."
    ),
]


def _model(given: Path | None, default: str) -> Path:
    return given or Path(os.path.relpath(_root() / "models" / default))


def _sampling(
    max_new_tokens: int,
    min_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
) -> Sampling:
    from gpt.generation import Sampling

    return Sampling(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_texts=tuple(filter(None, stop or [])),
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on with.")],
    model: _ModelOption = None,
    max_new_tokens: _MaxNewTokensOption = 100,
    min_new_tokens: _MinNewTokensOption = 0,
    temperature: _TemperatureOption = 0.0,
    top_k: _TopKOption = None,
    top_p: _TopPOption = None,
    repetition_penalty: _RepetitionPenaltyOption = 1.0,
    seed: _SeedOption = None,
    stop: _StopOption = None,
    precision: _PrecisionOption = "fp32",
    engine: _EngineOption = "auto",
) -> None:
    """Let a base model go on with a text (by default models/pretrain)."""
    from pipeline.use import predict

    sampling = _sampling(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop
    )
    directory = _model(model, "pretrain")
    predict.generate(directory, prompt, sampling, precision=precision, engine=engine)


@app.command()
def chat(
    instruction: Annotated[
        str | None, typer.Argument(help="Answer this one; without it, what you type or pipe in.")
    ] = None,
    context: Annotated[str, typer.Option("--input", help="What the instruction is about.")] = "",
    system: Annotated[str, typer.Option(help="How the assistant is to behave.")] = "",
    turns: Annotated[
        int | None,
        typer.Option(min=1, help="Turns it reads at once (by default as many as it learnt from)."),
    ] = None,
    model: _ModelOption = None,
    max_new_tokens: _MaxNewTokensOption = 200,
    min_new_tokens: _MinNewTokensOption = 0,
    temperature: _TemperatureOption = 0.0,
    top_k: _TopKOption = None,
    top_p: _TopPOption = None,
    repetition_penalty: _RepetitionPenaltyOption = 1.0,
    seed: _SeedOption = None,
    stop: _StopOption = None,
    precision: _PrecisionOption = "fp32",
    engine: _EngineOption = "auto",
) -> None:
    """Talk to the assistant (by default models/assistant)."""
    from pipeline.use import predict

    sampling = _sampling(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop
    )
    directory = _model(model, "assistant")
    predict.chat(
        directory,
        instruction,
        context,
        sampling,
        system=system,
        turns=turns,
        precision=precision,
        engine=engine,
    )


@app.command()
def classify(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts; `-` reads lines.")
    ] = None,
    model: _ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a text.")] = False,
) -> None:
    """Classify texts (by default with models/classifier)."""
    from pipeline.use import predict

    predict.classify_texts(_model(model, "classifier"), texts or [], as_json)


@app.command()
def sync() -> None:
    """Send the runs to MLflow that it did not take when they were made, because it was gone."""
    from pipeline.tracking.sender import send_all

    if not send_all(_root(), say):
        say("nothing to send: MLflow has every run")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="The points: YAML, as sweeps/classifier.yaml.")],
    jobs: Annotated[int, typer.Option(min=1, help="So many points at the same time.")] = 1,
    promote: Annotated[
        bool, typer.Option("--promote", help="Make the best point's model the champion.")
    ] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Put the best point's values into params.yaml.")
    ] = False,
) -> None:
    """Try other parameters, a grid or a search, beside the pipeline; compare the results."""
    from pipeline.sweep.command import run_sweep

    raise typer.Exit(run_sweep(_root(), file, jobs=jobs, promote=promote, apply=apply))


@app.command()
def agent(
    pool: Annotated[str, typer.Option(help="The work pool to take flow runs from.")] = "gpu",
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Stages on an accelerator at a time; else a card each."),
    ] = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Flow runs at a time; else one more than slots.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Look at the machine only.")] = False,
) -> None:
    """Run on this machine what is scheduled in Prefect: look at it, then work until Ctrl-C."""
    root = _root()
    api = _team_api(root)
    from pipeline.flow.agent import check_machine, serve
    from pipeline.flow.prefect_api import prefect_told

    if check:
        checks = check_machine(root, api)
        for each in checks:
            say(each)
        if any(each.state == "error" for each in checks):
            raise typer.Exit(2)
        return
    with prefect_told():
        serve(root, api, pool=pool, slots=slots, runs=runs)


def _team_api(root: Path) -> str:
    """The Prefect server to work with; this process's Prefect, not yet imported, uses it.

    Raises:
        InputError: none is known.
    """
    from pipeline.flow.prefect_api import environment, running_api

    if (api := running_api(root)) is None:
        raise InputError(
            "no Prefect server is known; set PREFECT_API_URL, or start one with `make ui`"
        )
    os.environ.update(environment(root))
    os.environ["PREFECT_API_URL"] = api
    return api


@app.command()
def push() -> None:
    """Let the DVC remote have all that was made here, so that another machine need not make it."""
    from pipeline.dag.cache import push as share

    say(f"{share(_root())} files pushed")


@app.command()
def notify(
    block: Annotated[str, typer.Argument(metavar="TYPE/NAME", help="As slack-webhook/ops.")],
) -> None:
    """Let a notification block of the Prefect server hear of runs that fail."""
    _team_api(_root())
    from pipeline.flow.notices import NAME
    from pipeline.flow.notices import notify as tell
    from pipeline.flow.prefect_api import prefect_told

    with prefect_told():
        done = "made" if tell(block) else "changed"
    say(f"automation {NAME!r} {done}: {block} hears of runs that fail")


@app.command("flow-run", hidden=True)
def flow_run() -> None:
    """What a worker starts for each flow run."""
    from pipeline.flow.agent_start import become_flow_run

    become_flow_run()


@app.command()
def lineage(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A model version (models:/assistant/3, assistant@champion), a file, a run or a "
            "commit.",
        ),
    ],
    up: Annotated[bool, typer.Option("--up", help="Only where it came from.")] = False,
    down: Annotated[bool, typer.Option("--down", help="Only what was made of it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Nodes and links as JSON.")] = False,
) -> None:
    """From a model, file, run or commit back to its raw sources, and on to what was made of it."""
    from pipeline.history.lineage import print_lineage

    root = _root()
    print_lineage(root, what, up=up or not down, down=down or not up, as_json=as_json)


@app.command()
def reproduce(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A model version, as models:/assistant/3, or run.")
    ],
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the workspace that it was made in.")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="Execute every stage before it anew, too.")
    ] = False,
) -> None:
    """Make a model version again from its commit, parameters and inputs; compare every byte."""
    from pipeline.history.reproduce import reproduce as make_again

    make_again(_root(), what, keep=keep, whole=whole)


@app.command()
def compare(
    one: Annotated[
        str, typer.Argument(metavar="A", help="classifier/2, classifier@champion, or a run's id.")
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="B", help="Another; without it A and the champion.")
    ] = None,
    answers: Annotated[
        int, typer.Option(min=0, help="So many answers side by side, of those that differ.")
    ] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON.")] = False,
) -> None:
    """What differs between two versions of a model, or two runs of a stage."""
    from pipeline.history.compare import print_comparison

    print_comparison(_root(), one, other, answers=answers, as_json=as_json)


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A registered model.")],
) -> None:
    """Make the previous champion the champion again; the two change places."""
    from pipeline.verdict.promotion import roll_back

    champion, previous = roll_back(_root(), model)
    say(f"{model}: version {champion} is the champion again, version {previous} is `previous`")
