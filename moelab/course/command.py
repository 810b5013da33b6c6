"""`moelab challenge`: the challenges, an entry, a board and its check at a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moelab.course.challenge.board import Leaderboard

RIGHTS = "It runs as it is, with your rights"  # own_code.RIGHTS, without importing torch
app = typer.Typer(help="Win by settings: a memory limit, a loss limit, one figure to beat.")

Board = Annotated[Path, typer.Argument(help="File of entries (JSON lines).")]
Which = Annotated[str | None, typer.Option("--challenge", help="Where it holds several.")]


@app.command("list")
def show() -> None:
    """Say what there is to win."""
    from moelab.course.challenge import TASKS, challenge

    for name in TASKS:
        typer.echo(challenge(name))


@app.command()
def enter(
    challenge: Annotated[str, typer.Argument(help='Like "six megabytes".')],
    name: Annotated[str, typer.Argument(help="Whose entry it is.")],
    strategy: Annotated[str, typer.Argument(help='As for bench: "hobbit + 16 bit + t1=0.4".')],
    budget: Annotated[str, typer.Option(help="Bytes, 6MB, 1.5GiB or 25%.")],
    board: Annotated[Path | None, typer.Option(help="File that keeps the entries.")] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(help=f"A decision of your own: evict=file.py:Class. {RIGHTS}."),
    ] = None,
    *,
    quick: Annotated[bool, typer.Option(help="A trial in seconds; it never ranks.")] = False,
) -> None:
    """Measure settings and print the verdict; exit code 1 where a limit failed."""
    import moelab

    parts = dict(_pair(words) for words in own or [])
    opened = moelab.challenge(challenge, board=board)
    entry = opened.enter(name, strategy=strategy, budget=budget, quick=quick, **parts)
    typer.echo(entry)
    if not entry.accepted:
        raise typer.Exit(1)


@app.command()
def board(file: Board, challenge: Which = None) -> None:
    """Print a board, best first."""
    from moelab.course.challenge import leaderboard

    _print(leaderboard(file, challenge))


@app.command()
def verify(
    file: Board,
    challenge: Which = None,
    *,
    own_code: Annotated[
        bool, typer.Option(help=f"Also run the board's own code. {RIGHTS}: read it first.")
    ] = False,
) -> None:
    """Measure every entry again; exit code 1 where figures do not reproduce."""
    from moelab.course.challenge import verify as measure_again

    found = measure_again(file, challenge, own_code=own_code)
    _print(found)
    if set(found["verified"]) != {"yes"}:
        raise typer.Exit(1)


def _pair(words: str) -> tuple[str, str]:
    role, equals, where = words.partition("=")
    if not equals or ".py:" not in where:
        raise ValueError(f"--own {words!r}: write evict=file.py:Class")
    return role.strip(), where.strip()


def _print(board: Leaderboard) -> None:
    shown = board.drop(columns=["machine", "version", "made", "own code"])
    shown = shown.astype({"rank": object}).where(shown.notna(), "")
    typer.echo(f"{board.task.name}: {board.task.question}")
    typer.echo(shown.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    for fault in board.faults:
        typer.echo(f"could not be read: {fault}")
