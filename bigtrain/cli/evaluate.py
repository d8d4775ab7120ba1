"""`bigtrain eval` and `bigtrain predict`: what a trained model is worth, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bigtrain.cli.config import Overrides
from bigtrain.cli.report import complete_run

if TYPE_CHECKING:
    from bigtrain.evaluating import Measured, Prediction, Trained

_WIDEST_MATRIX = 20  # classes that a terminal shows

Place = Annotated[
    str,
    typer.Argument(
        metavar="RUN|CKPT",
        help="A run's name or folder (its newest checkpoint), or a checkpoint.",
        autocompletion=complete_run,
    ),
]
Ema = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="With the moving averages of weights, or without; as the run evaluated."),
]
Best = Annotated[bool, typer.Option("--best", help="Of a run, the best checkpoint (checkpoint.keep_best).")]
Folder = Annotated[Path, typer.Option("--dir", help="The folder of all runs, in which names are looked for.")]


def evaluate(
    place: Place,
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="KEY=VALUE", help="As data.KEY=VALUE: other data, say.")
    ] = None,
    folder: Folder = Path("runs"),
    best: Best = False,
    ema: Ema = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Measure a trained model on all of its evaluation data, in this process, whatever engine trained it."""
    from bigtrain.evaluating import evaluate as measure
    from bigtrain.evaluating import find_checkpoint, opened

    changes = ["eval.max_batches=null", *(f"data.{change}" for change in data or ()), *(overrides or ())]
    with opened(find_checkpoint(place, folder, best=best), changes, averaged=ema) as trained:
        found = measure(trained)
        if as_json:
            typer.echo(json.dumps({**_about(trained), **found.as_dict()}, indent=2))
        else:
            _print(trained, found)


def predict(
    place: Place,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT…", help="Pictures, or folders of them; or texts, @FILE for one in a file."),
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens that are added to a prompt.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; 1 draws as learnt.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="`bytes`, a tokenizer.json or its folder, instead of the run file's.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the run file: finetune.init_from, say.")
    ] = None,
    folder: Folder = Path("runs"),
    best: Best = False,
    ema: Ema = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of text.")] = False,
) -> None:
    """Say the class of pictures or texts, or go on with texts."""
    from bigtrain.evaluating import find_checkpoint, opened
    from bigtrain.evaluating import predict as ask
    from bigtrain.evaluating.texts import Generating

    how = Generating(max_tokens, temperature, seed, tokenizer)
    with opened(find_checkpoint(place, folder, best=best), changes or (), averaged=ema) as trained:
        answers = ask(trained, inputs, how)
        if as_json:
            typer.echo(json.dumps([answer.as_dict() for answer in answers], indent=2))
        elif as_csv:
            _print_csv([answer.as_dict() for answer in answers])
        else:
            for answer in answers:
                typer.echo(_line(answer))


def _about(trained: Trained) -> dict[str, Any]:
    return {"checkpoint": str(trained.path), "step": trained.step, "task": trained.config.task.name}


def _line(answer: Prediction) -> str:
    said = answer.answer
    if "answer" in said:
        return f"{answer.input}\n{said['answer']}\n"
    if "continuation" in said:
        return f"{answer.input}{said['continuation']}"
    return f"{answer.input}  {said['class']}  {said['probability']:.4f}"


def _print_csv(rows: list[dict[str, Any]]) -> None:
    import csv
    import sys

    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _print(trained: Trained, found: Measured) -> None:
    typer.echo(f"{trained.path}: step {trained.step:,}, {found.samples:,} samples")
    if not found.is_same_data:
        typer.echo("! the data are not those that the run was trained with")
    for name, value in found.metrics.items():
        if isinstance(value, int | float):
            typer.echo(f"  {name:<12}  {value:,}" if isinstance(value, int) else f"  {name:<12}  {value:.6g}")
    if not found.classes:
        return
    width = max(5, *(len(each.name) for each in found.classes))
    typer.echo(f"\n  {'class':<{width}}  precision  recall      f1  support")
    for each in found.classes:
        scores = f"{_score(each.precision):>9}  {_score(each.recall):>6}  {_score(each.f1):>6}"
        typer.echo(f"  {each.name:<{width}}  {scores}  {each.support:>7,}")
    if len(found.classes) > _WIDEST_MATRIX:
        typer.echo(f"\n  the confusion matrix of {len(found.classes)} classes: --json")
        return
    rows = found.metrics["confusion_matrix"].tolist()
    cell = max(len(str(count)) for row in rows for count in row) + 1
    typer.echo("\n  confusion matrix: a row for each label, a column for each prediction")
    for each, row in zip(found.classes, rows, strict=True):
        typer.echo(f"  {each.name:<{width}} " + "".join(f"{count:>{cell}}" for count in row))


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
