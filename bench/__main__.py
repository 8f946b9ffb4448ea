"""The command line: pick benchmarks, run them, print and write their tables."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from bench.harness import Settings, Skipped, as_table, measure_machine, write_results
from bench.worker import as_it_comes
from gpt.base.errors import InputError, RunError

AGAINST_PEERS = {
    "training": "gpt",
    "generation": "gpt",
    "tokenization": "gpt",
    "classification": "stages",
    "instruction": "stages",
}
"""Each benchmark, and the folder that it lies in."""
FOLDER_OF = {
    **AGAINST_PEERS,
    "ablation": "gpt",
    "keeping": "pipeline",
    "recipe": "gpt",
    "assistant": "stages",
    "orchestration": "pipeline",
}
NAMES = tuple(FOLDER_OF)
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that `arguments` name; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    out: Path | None = options.out or (None if options.quick else RESULTS)
    settings = Settings(
        threads=options.threads or os.cpu_count() or 1,
        rounds=options.rounds or (3 if options.quick else 5),
        quick=options.quick,
        full=options.full,
        batch=options.batch,
        vocabulary=options.vocabulary or _mirrored("gpt2"),
        weights=options.weights,
        mirror=_mirrored(""),
    )
    # in a file a table may be as wide as it likes
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        as_it_comes(settings.threads)
        machine = measure_machine(settings)
        console.print(f"{machine}.", highlight=False)
        for name in options.names or AGAINST_PEERS:
            # imported when its turn comes: a benchmark needs only its own peers
            benchmark = importlib.import_module(f"bench.{FOLDER_OF[name]}.{name}")
            comparisons = []
            try:
                with console.status(name):
                    for comparison in benchmark.compare(settings, machine):
                        console.print("", as_table(comparison))
                        comparisons.append(comparison)
            except Skipped as skipped:
                console.print(f"\n{name}: skipped: {skipped}", highlight=False, soft_wrap=True)
                continue
            if out is not None:
                write_results(
                    out / f"{name}.md",
                    comparisons,
                    machine=machine,
                    settings=settings,
                    command=shlex.join(["python", "-m", "bench", *arguments]),
                )
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except ModuleNotFoundError as error:
        print(f"error: {error}; install the peers with `pip install -e .[dev]`", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")  # one line, as everywhere in this project


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bench",
        description="Measure this project against its peers, side by side on the same inputs.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        type=_name,
        help=(
            f"{', '.join(AGAINST_PEERS)}; or, against ourselves, ablation, keeping, recipe and "
            "assistant"
        ),
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes and few rounds; writes nothing unless --out names a folder",
    )
    parser.add_argument("--rounds", type=_positive, help="timed runs of each alternative (5)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (every core)")
    parser.add_argument(
        "--batch", type=_positive, default=8, help="rows in a training step at 124M (8)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="run the naive classification loop to its end, too (half an hour)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="a GPT-2 model directory to fine-tune (124M with random weights)",
    )
    parser.add_argument(
        "--vocabulary",
        type=Path,
        help="a folder of GPT-2's vocabulary files (that of the mirror; else one is learnt)",
    )
    parser.add_argument("--out", type=Path, help="where tables are written (bench/results)")
    return parser


def _name(text: str) -> str:
    if text not in NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(NAMES)}")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _mirrored(name: str) -> Path | None:
    """A folder of the mirror, where there is one."""
    mirror = os.environ.get("GPT_PIPELINE_MIRROR")
    folder = Path(mirror) / name if mirror else None
    return folder if folder is not None and folder.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
