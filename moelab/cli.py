"""The command line: `moelab` opens the lab, `moelab serve` shows it to a class, the rest is text.

Torch and transformers are imported by the commands that need them, so `moelab --help` is instant.
What a person can put right (a bad value, a missing file) is one line and exit code 2.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelab.course.command import app as challenges
from moelab.course.jupyter import open_jupyter

if TYPE_CHECKING:
    from moelab import Run
    from moelab.bench import Files
    from moelab.views.sheet import Shown

_POLL_SECONDS = 0.03
_BESIDE = {"regimes": "moelab.bench.papers.regimes", "systems": "moelab.bench.systems"}
_SUITES = ("papers", "scheduler", "rivals", *_BESIDE)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Put a Mixture-of-Experts model's experts on disk, and watch what a memory budget does.",
    epilog="Without a command: the same as `moelab lab`.",
)
app.add_typer(challenges, name="challenge")

Model = Annotated[
    str,
    typer.Argument(help='"demo", "smollm2-moe", "synopsis", a store, a checkpoint or a hub id.'),
]
Budget = Annotated[
    str | None,
    typer.Option(help="For resident experts: bytes, 64MB, 1.5GiB or 50%; default 25%."),
]
Seed = Annotated[int, typer.Option(help="Of sampling.")]


def main() -> None:
    """Run the command line; end with exit code 2 and one line where the user can put it right."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(_refuse(error))


def _refuse(error: Exception) -> int:
    print(f"moelab: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        import moelab

        print(f"moelab {moelab.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        open_jupyter([])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context) -> None:
    """Open JupyterLab on the course; options go to JupyterLab (--no-browser, --port 8899).

    From an installed package, the notebooks are copied to ./moelab-notebooks first; a notebook that
    is there already is left as it is. JupyterLab listens on 127.0.0.1 only.
    """
    open_jupyter(context.args)


@app.command()
def serve(
    notebook: Annotated[
        Path | None, typer.Option(help="To show instead of the demo's dashboard.")
    ] = None,
    ip: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8866,
    max_visitors: Annotated[
        int | None, typer.Option(help="Kernels at a time.", show_default="as fit the memory")
    ] = None,
    *,
    browser: Annotated[bool, typer.Option(help="Open the page here too.")] = True,
) -> None:
    """Show the live lab to a class as a web page (Voila): no cells, a kernel for each visitor."""
    from moelab.course import serve as serving

    serving.serve(notebook, ip=ip, port=port, max_visitors=max_visitors, open_browser=browser)


@app.command()
def doctor() -> None:
    """Say what is missing here and how to mend it; exit code 1 where something does not work."""
    import moelab

    found = moelab.doctor()
    print(found)
    if not found.healthy:
        raise typer.Exit(1)


@app.command()
def info(model: Model = "demo", budget: Budget = None) -> None:
    """Print a model's sizes and what fits the budget."""
    import moelab
    from moelab.scheduling.budget import bits_in_words

    with moelab.open(model, budget=budget) as opened:
        facts = opened.info()
    rows = []
    for name, value in facts.items():
        if name == "expert_bytes":
            rows += [(f"{name} at {bits_in_words(bits)}", _size(n)) for bits, n in value.items()]
        else:
            rows.append((name, _size(value) if name.endswith("_bytes") else _word(value)))
    _print_table(rows)


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="Known name, config.json's folder, GGUF or hub id.")],
    memory: Annotated[str | None, typer.Option(help="In all, like 8GB [what is free].")] = None,
    device: Annotated[str, typer.Option(help="disk, or an emulated one such as hdd.")] = "disk",
    html: Annotated[Path | None, typer.Option(help="Write the sheet as a page.")] = None,
    *,
    ghost: Annotated[bool, typer.Option(help="Then measure that on a ghost.")] = False,
) -> None:
    """Say what a model needs and how fast it would be here, by its configuration alone."""
    import moelab

    found = moelab.fit(model, memory=memory, device=device)
    _print_sheet(found, html)
    if ghost:
        print(found.check())


@app.command()
def clinic(
    trace: Annotated[
        Path, typer.Argument(help="A trace: moelab's, BigMoeOnEdge's, llama.cpp's...")
    ],
    memory: Annotated[
        str | None, typer.Option(help="For experts: 4GB or 25% [as recorded].")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose experts' sizes count, as for fit.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Of the experts.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the sheet as a page.")] = None,
) -> None:
    """Examine recorded routing: policy or memory, every strategy, what to set in other tools."""
    import moelab

    _print_sheet(moelab.clinic(trace, model=model, memory=memory, bits=bits), html)


def _print_sheet(found: Shown, html: Path | None) -> None:
    print(found)
    if html is not None:
        print(f"\n{found.save(html)}")


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face hub id.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make.")],
    tiers: Annotated[str, typer.Option(help="Bits to store every expert at.")] = "16,8,4,3,2",
    *,
    overwrite: Annotated[bool, typer.Option(help="Replace another store.")] = False,
) -> None:
    """Pack a checkpoint into a store."""
    import moelab

    try:
        bits = tuple(int(part) for part in _split(tiers))
    except ValueError:
        raise ValueError(f"--tiers {tiers!r}: write numbers like 16,8,4") from None
    made = moelab.pack(source, destination, tiers=bits, overwrite=overwrite)
    total = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    print(f"{made}: {_size(total)}, tiers {', '.join(map(str, bits))}")


@app.command()
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What the text begins with, or is made of.")],
    budget: Budget = None,
    bits: Annotated[int | None, typer.Option(help="Tier; default the store's best.")] = None,
    low_bits: Annotated[int | None, typer.Option(help="Tier of unimportant misses.")] = None,
    strategy: Annotated[str, typer.Option(help="Like lru, edgemoe, hobbit or swapmoe.")] = "lru",
    device: Annotated[str, typer.Option(help="disk, or an emulated one such as hdd.")] = "disk",
    prefetch: Annotated[int | None, typer.Option(help="Layers to look ahead, 0 to 3.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Upper limit.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.")] = None,
    seed: Seed = 0,
    *,
    kl: Annotated[bool, typer.Option(help="Compare each token with full precision.")] = False,
) -> None:
    """Generate text under a budget, then print what it cost. Ctrl-C stops and still prints."""
    import moelab
    from moelab.runs import account

    with moelab.open(
        model,
        budget=budget,
        bits=bits,
        low_bits=low_bits,
        strategy=strategy,
        device=device,
        prefetch=prefetch,
        measure_kl=kl,
        seed=seed,
    ) as opened:
        going = opened.start(prompt, max_new_tokens=max_new_tokens, temperature=temperature)
        _stream(going)
        summary = going.summary()
    print(f"{account.ending(going.ended, len(going.tokens), max_new_tokens)}; {going.sentence()}")
    rows = [(n, _size(v) if "bytes" in n else _word(v)) for n, v in summary.items()]
    _print_table([row for row in rows if row[1]])
    if going.error is not None:
        raise ValueError(f"the run ended early: {going.error}") from going.error


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="As for the other commands.")] = "demo",
    strategies: Annotated[
        str, typer.Option(help='Like "lru, hobbit + evict lru, lfu + 4 bit, lru + mixed 16/4".')
    ] = "",
    budgets: Annotated[str, typer.Option(help="Like 25%,50%,8MB.")] = "",
    devices: Annotated[str, typer.Option(help="Like disk,hdd.")] = "",
    tokens: Annotated[int, typer.Option(help="Generated per run.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs per row; the row is their median.")] = 3,
    prompt: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table.")] = None,
    suite: Annotated[
        str,
        typer.Option(help=f"Instead, a suite of questions: {', '.join(_SUITES)}."),
    ] = "",
    shape: Annotated[
        str, typer.Option(help='Of rivals: layers x experts, like "4x64 top-8 2048x1024".')
    ] = "",
    folder: Annotated[
        Path | None, typer.Option(help="Of rivals: where their files stay [moelab's cache].")
    ] = None,
    llama: Annotated[
        Path | None, typer.Option(help="Of rivals: llama-cpp-python's source package, unpacked.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="Renew the papers' tables in this file.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the papers' figure (SVG).")] = None,
    *,
    quality: Annotated[bool, typer.Option(help="Score the KL of each strategy.")] = True,
    quick: Annotated[
        bool, typer.Option(help="The suite in a minute; figures mean little.")
    ] = False,
) -> None:
    """Measure strategy x budget x device in one go, or a suite of questions, and print tables."""
    from moelab import bench as measure
    from moelab.scheduling.writing import write_atomically

    for file in (json_file, markdown, tables, picture):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"cannot write {file}: the folder {file.absolute().parent} is missing")
    own = bool(strategies or budgets or devices or prompt or (tokens, repeats) != (64, 3))
    given = {"contenders": own, "papers": bool(tables or picture), "quick": quick}
    _check_suite(suite, given | {"rivals": bool(shape or folder or llama)})
    if suite == "papers":
        _bench_papers(model, measure.Files(json_file, markdown, tables, picture), quick=quick)
        return
    if suite == "scheduler":
        frame = measure.deciding(quick=quick)
        report = measure.deciding_report(frame)
    elif suite == "rivals":
        from moelab.bench.rivals import suite as beside

        frame = beside.rivals(shape, folder=folder, llama=llama, quick=quick)
        report = beside.report(frame)
    elif suite in _BESIDE:
        asked = import_module(_BESIDE[suite])
        frame = asked.measured(quick=quick)
        report = asked.report(frame)
    else:
        frame = measure.bench(
            model,
            strategies=_split(strategies) or measure.STRATEGIES,
            budgets=_split(budgets) or measure.BUDGETS,
            devices=_split(devices) or measure.DEVICES,
            tokens=tokens,
            repeats=repeats,
            prompt=prompt,
            quality=quality,
        )
        report = measure.as_markdown(measure.report(frame)) + "\n"
    if json_file is not None:
        write_atomically(json_file, measure.as_json(measure.as_record(frame)).encode())
    if markdown is not None:
        write_atomically(markdown, report.encode())
    print(report, end="")
    _stopped_early(complete=frame.attrs.get("complete", True))


def _check_suite(suite: str, given: dict[str, bool]) -> None:
    """Refuse options that do not belong together."""
    if suite not in ("", *_SUITES):
        raise ValueError(f"unknown suite {suite!r}; there are: {', '.join(_SUITES)}")
    if suite and given["contenders"]:
        raise ValueError("a suite brings its own contenders, runs and prompts; leave them out")
    if suite != "papers" and given["papers"]:
        raise ValueError("--tables and --picture belong to a suite: add --suite papers")
    if suite != "rivals" and given["rivals"]:
        raise ValueError("--shape, --folder and --llama belong to a suite: add --suite rivals")
    if given["quick"] and not suite:
        raise ValueError(f"--quick belongs to a suite: {', '.join(_SUITES)}")


def _bench_papers(model: str, files: Files, *, quick: bool) -> None:
    """Measure the papers' suite, write, print."""
    from moelab.bench.papers.suite import papers

    files.check(quick=quick, model=model)
    done = papers(model, quick=quick)
    for written in files.write(done):
        print(f"moelab: wrote {written}", file=sys.stderr)
    print(done.markdown(), end="")
    _stopped_early(complete=done.complete)


def _stopped_early(*, complete: bool) -> None:
    """Say that Ctrl-C left something out, and end so that a script knows."""
    if not complete:
        print("moelab: stopped early; kept tables and figure are as they were", file=sys.stderr)
        raise typer.Exit(130)


def _stream(going: Run) -> None:
    """Print a run's text as it comes; Ctrl-C stops it."""
    print(going.prompt, end="\n" * bool(going.trace.shape.encoder_layers), flush=True)
    shown = 0
    while True:
        try:
            done = not going.running
            text = going.text
            print(text[shown:], end="", flush=True)
            shown = len(text)
            if done:
                break
            time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            going.stop()
    print("\n")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _word(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return str(value)


def _size(nbytes: float) -> str:
    from moelab.spelling import size

    return size(nbytes)
