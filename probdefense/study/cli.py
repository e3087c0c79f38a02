"""The ``probdefense`` command: a thin face over the library.

Exit codes: 0 done; 2 a request that cannot be done or a place that cannot be written (one sentence on
stderr, and no file changed); 130 interrupted.
"""

import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from probdefense import __version__
from probdefense.study import cli_own

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which fills paragraphs to the width
)

OTHERS = r"(arviz|jax|matplotlib|numpyro|pandas|xarray)\b"
"""Whose warnings are for those who write programs with them, not for who runs the command."""

REFUSED, INTERRUPTED = 2, 130
"""Exit codes."""


def _version(asked: bool) -> None:
    if asked:
        print(f"probdefense {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Adversarial defenses as probabilistic programs: train, attack, report."""


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Recipes = Annotated[
    list[Path] | None, typer.Option(help="A Python file with recipes of your own; may be repeated.")
]


@app.command()
def compare(
    context: typer.Context,
    defenses: Annotated[
        str, typer.Option(help="Comma-separated names, or 'all'; see 'probdefense list'.")
    ] = "none,madry,rse,bayesian,adv_bnn",
    attacks: Annotated[
        str, typer.Option(help="Comma-separated names; clean accuracy and the suite are always there.")
    ] = "clean,eot_pgd,suite",
    data: Annotated[
        str, typer.Option(help="By name, see 'probdefense list'; folder:PATH or FILE.py:NAME.")
    ] = "digits",
    eps: Annotated[
        float | None, typer.Option(help="l-inf radius in pixels, (0, 1]; the data set's usual one if absent.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Draws behind every verdict.")] = 50,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    seed: Annotated[int, typer.Option(help="Of training, attacks and verdicts.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder to write to; only our own files are replaced.")] = Path(
        "out"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer epochs, gradients and images.")] = False,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the data; PROBDEFENSE_DATA if absent.")
    ] = None,
    recipes: Recipes = None,
    study: Annotated[
        Path | None, typer.Option(help="A study file; options given beside it count more.")
    ] = None,
    net: Annotated[
        str | None, typer.Option(help="Of probdefense.models, torchvision:NAME or FILE.py:NAME.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Several seeds of the training, as in 0,1,2, joined as replicates.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the defenses that are finished in --out.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every pair, note and advice.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train defenses, attack each, and write a report that can be trusted.

    Writes report.json, timing.json, arrays.npz, robustness.png, report.html and posterior.nc; study.toml,
    which runs it again; and a folder defenses, with a checkpoint of each as soon as it is finished.
    """
    from probdefense.study import cli_compare

    given = {name for name in context.params if _is_given(context, name)}
    cli_compare.run(context.params, given)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command("list")
def list_names(recipes: Recipes = None, as_json: AsJson = False) -> None:
    """List the defenses, objectives, attacks and data sets, with one line each."""
    from probdefense.study.job import catalog

    try:
        sections = catalog(recipes or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        print(json.dumps(sections, indent=2))
        return
    for title, lines in sections.items():
        width = max(len(name) for name in lines)
        print(title, *(f"  {name.ljust(width)}  {about}" for name, about in lines.items()), "", sep="\n")


@app.command()
def version() -> None:
    """Print the versions of probdefense and of what it stands on."""
    from probdefense.study.job import versions

    print("\n".join(f"{name} {number}" for name, number in versions().items()))


def main() -> None:
    """Runs the command; a bad request becomes one sentence on stderr and exit code 2."""
    warnings.filterwarnings("ignore", module=OTHERS)
    try:
        code = app(standalone_mode=False)  # which returns the code of an interruption
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except ChildProcessError as error:
        _end(str(error), REFUSED)
    except OSError as error:
        with suppress(OSError):  # what is left to print has no place either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(f"reading or writing failed: {error}; check where the output goes", REFUSED)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _end(error.format_message(), REFUSED)
    if code == INTERRUPTED:
        _end("interrupted", INTERRUPTED)
    if code:
        sys.exit(code)


def _end(sentence: str, code: int) -> None:
    if sentence:  # typer has printed the help of an empty request
        print("probdefense:", " ".join(sentence.split()), file=sys.stderr)
    sys.exit(code)


for command in (cli_own.evaluate, cli_own.certify, cli_own.report):
    app.command()(command)
