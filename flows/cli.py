"""The `t2i` command. Nothing heavy is imported before a command needs it: `t2i --help` answers at once."""

from __future__ import annotations

import json
import logging
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import cli_answers, cli_operations, cli_sharing
from flows.cli_parts import Debug, Force, Json, Preset, Root, RunName, RunRoot, Set, read_config, say
from infra.errors import ConfigError, LifecycleError
from infra.logging import setup_logging

app = typer.Typer(
    name="t2i",
    help="The whole life of a text-to-image model: curate, train, distil, judge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_answers.app)
app.add_typer(cli_operations.app)
app.add_typer(cli_sharing.app)


class Stopped(BaseException):
    """Ctrl-C or SIGTERM came; no library may take it for its own."""


@app.command()
def run(preset: Preset, set_: Set = None, root: Root = None, force: Force = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Show the plan, then run every stage that has no result yet."""
    from flows.dag import stage_specs
    from flows.drive import run_lifecycle
    from flows.plan import plan as make_plan
    from infra.storage import open_store

    config = read_config(preset, set_, root)
    rows = make_plan(stage_specs(config), open_store(config.run.root), force or ())
    _say_plan(rows, config.run)
    record = _interruptible(lambda: run_lifecycle(config, rows, force or [], _display()), config.run.root, as_json)
    _finish(record, as_json)


@app.command()
def plan(preset: Preset, set_: Set = None, root: Root = None, force: Force = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Say which stages would run, and why; runs nothing."""
    from flows.dag import stage_specs
    from flows.display import plan_lines, times_lines
    from flows.plan import plan as make_plan
    from infra.storage import open_store

    config = read_config(preset, set_, root)
    rows = make_plan(stage_specs(config), open_store(config.run.root, create=False), force or ())
    if as_json:
        say(json.dumps([row.model_dump(mode="json", exclude={"artifact"}) for row in rows]))
    else:
        say("\n".join([*plan_lines(rows, config.run), *times_lines(config)]))


@app.command()
def status(name: Annotated[str | None, typer.Argument(help="Name of a run, or latest; none: all runs")] = None, root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """List the runs, or one run's stages."""
    from flows.display import run_lines, stage_lines
    from infra.storage import open_store

    store = open_store(root, create=False)
    found: Any = store.list_runs() if name is None else store.read_run(name)
    if as_json:
        say(json.dumps(found))
    else:
        say("\n".join(run_lines(found) if name is None else stage_lines(found)))


@app.command()
def rerun(name: RunName, stage: Annotated[str, typer.Argument(help="Name of the stage")], force: Annotated[bool, typer.Option(help="Make it anew although its result is there")] = True, root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Run one stage of a recorded run again, alone."""
    from flows.drive import run_stage

    _finish(_interruptible(lambda: run_stage(name, stage, force, root, _display()), root, as_json), as_json)


@app.command()
def report(name: RunName = "latest", root: RunRoot = "runs", as_json: Json = False, browse: Annotated[bool, typer.Option("--open", help="Open it in a browser")] = False, debug: Debug = False) -> None:  # fmt: skip
    """Say where a run's report is; --json prints its scores."""
    from flows.summary import public
    from infra.storage import open_store

    record = open_store(root, create=False).read_run(name)
    if not as_json and not record.get("report"):
        raise ConfigError(
            f"run {record['run']} has no report (outcome {record.get('outcome')}); finish it: t2i run PRESET"
        )
    say(json.dumps(public(record)) if as_json else record["report"])
    if browse:
        typer.launch(record["report"])


@app.command()
def sample(name: RunName, prompts: Annotated[list[str], typer.Argument(help="What to draw")], stage: Annotated[str | None, typer.Option(help="Checkpoint that draws [default: the last of post-training]")] = None, seed: int = 0, out: Annotated[Path, typer.Option(help="Folder for the pictures")] = Path("samples"), root: RunRoot = "runs", enhance: Annotated[bool, typer.Option("--enhance", help="Rewrite prompts first with the run's prompt enhancer")] = False, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Draw prompts with a checkpoint of a run."""
    from flows.drive import draw, enhanced

    if enhance:
        made = enhanced(name, prompts, stage, root)
        sys.stderr.writelines(f"{e.original!r} -> {e.revised!r}{f' ({e.reason})' if e.reason else ''}\n" for e in made)
        prompts = [e.revised for e in made]
    paths = draw(name, prompts, stage, seed, out, root)
    say(json.dumps([str(path) for path in paths]) if as_json else "\n".join(map(str, paths)))


@app.command()
def personalize(folder: Annotated[Path, typer.Argument(help="Folder with 3 to 30 pictures of one subject, each with an optional .txt caption")], name: Annotated[str, typer.Option(help="Name of the subject: small letters, digits and hyphens")], run: Annotated[str, typer.Option(help="Finished run whose model learns it, or latest")] = "latest", class_word: Annotated[str | None, typer.Option(help="What the subject is, such as dog [default: the name]")] = None, token: Annotated[str | None, typer.Option(help="Rare word that will stand for it [default: one is found]")] = None, steps: Annotated[int | None, typer.Option(min=1, help="Training steps [default: the run's]")] = None, rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter [default: the run's]")] = None, root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Teach a finished run's model a subject from a few pictures of it."""
    from flows.drive import made, run_personalize

    _refuse_folder(folder, name)
    changes = {"class_word": class_word, "token": token, "steps": steps, "rank": rank}
    record = _interruptible(lambda: run_personalize(folder, name, run, changes, root, _display()), root, as_json)
    found = made(dict(record), root)
    if as_json:
        say(json.dumps(found))
    else:
        say("\n".join(f"{what:<11}{where}" for what, where in found.items()))
        say(f"next: t2i sample {found['run']} 'a {found['token']} {found['class']}' --root {root}")


def _refuse_folder(folder: Path, name: str) -> None:
    """What can be known to be wrong before anything starts."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ConfigError(f"--name {name!r} is no name of a stage; use small letters, digits and single hyphens")
    if not folder.expanduser().is_dir():
        raise ConfigError(f"folder {folder} does not exist; give a folder with 3 to 30 pictures of one subject")


@app.command()
def ablate(preset: Preset, switch: Annotated[str, typer.Option(help="What is left out: density, shift, stratified, repa, repa-stop, irepa, muon, tread or curriculum")], seeds: Annotated[int, typer.Option(help="Seeds of each arm")] = 3, share: Annotated[float, typer.Option(min=0.001, max=10, help="Share of the preset's steps")] = 1.0, out: Annotated[Path, typer.Option(help="Folder for ablate-SWITCH.json")] = Path("benchmarks/results"), set_: Set = None, root: Root = None, as_json: Json = False, debug: Debug = False) -> None:  # fmt: skip
    """Train with and without one switch, at equal samples and equal time, and say what it gained."""
    from flows.ablate import ablate as measure

    result = measure(read_config(preset, set_, root), switch, seeds, share, out, _display())
    if as_json:
        say(json.dumps(result))
        return
    for name in ("equal_samples", "equal_time"):
        gap = result[name]
        say(f"{switch}, {name.replace('_', ' ')}: {gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")


@app.command()
def doctor(root: RunRoot = "runs", as_json: Json = False, debug: Debug = False) -> None:
    """Say what is installed, what is wrong, and what to do."""
    from infra.doctor import diagnose

    checks = diagnose(root)
    if as_json:
        say(json.dumps([check._asdict() for check in checks]))
    else:
        width = max(len(check.name) for check in checks)
        advice = [f"; {check.fix}" if check.fix else "" for check in checks]
        lines = [f"{c.status:<4}  {c.name:<{width}}  {c.detail}{fix}" for c, fix in zip(checks, advice, strict=True)]
        say("\n".join(lines))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def init(folder: Annotated[str, typer.Argument(help="Pictures, tars or a URL list of yours; or a new folder")], out: Annotated[Path | None, typer.Option(help="Where to write the preset [default: NAME.yaml here; in a new folder, lifecycle.yaml]")] = None) -> None:  # fmt: skip
    """Look at your data, say what it is, and write a preset that reads it."""
    from flows.starting import new_preset

    target, said = new_preset(folder, out)
    say(f"{said}\nwrote {target}; next: t2i plan {target}")


def _display() -> Any:
    from flows.display import LineDisplay, LiveDisplay

    return LiveDisplay() if sys.stderr.isatty() else LineDisplay()


def _say_plan(rows: Any, run: Any) -> None:
    from flows.display import plan_lines

    sys.stderr.write("\n".join(plan_lines(rows, run)) + "\n")


def _interruptible(work: Any, root: str, as_json: bool) -> Mapping[str, Any]:
    """Do the work; when it is interrupted or fails, still end with the record where JSON is wanted."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    try:
        record: Mapping[str, Any] = work()
    except BaseException as error:
        if as_json:
            from flows.summary import public
            from infra.storage import open_store

            runs = open_store(root).list_runs()
            say(json.dumps(public(runs[0]) if runs else {}))
        if isinstance(error, KeyboardInterrupt):
            raise Stopped("interrupted") from None  # typer would only say "Aborted"
        raise
    return record


def _terminate(number: int, frame: object) -> None:
    raise Stopped("terminated")


def _finish(record: Mapping[str, Any], as_json: bool) -> None:
    from flows.display import clock
    from flows.summary import public

    if as_json:
        say(json.dumps(public(record)))
        return
    say(f"run {record['run']}: {record['outcome']} in {clock(record['wall_seconds'])}")
    if record.get("report"):
        say(f"report: {record['report']}")


def main() -> None:
    """Run the command; an error is one message and an exit code."""
    debug = "--debug" in sys.argv
    setup_logging(logging.WARNING, debug)
    if not debug:  # Prefect's own lines, tracebacks among them, are in its UI; ours say what a person needs
        for handler in logging.getLogger().handlers:
            handler.addFilter(lambda record: not record.name.startswith("prefect"))
    try:
        app()
    except LifecycleError as error:
        if debug:
            raise
        _stop(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        _stop(f"{type(error).__name__}: {error}; run again with --debug for the traceback", LifecycleError.exit_code)
    except BaseException as error:
        if isinstance(error, SystemExit) or debug:
            raise
        interrupted = str(error) == "interrupted"  # else ours or Prefect's word for SIGTERM
        _stop(_go_on("interrupted" if interrupted else "terminated"), 130 if interrupted else 143)


def _go_on(what: str) -> str:
    return f"{what}; finished stages and checkpoints are kept. To go on: t2i {shlex.join(sys.argv[1:])}"


def _stop(message: str, code: int) -> None:
    sys.stderr.write(f"t2i: {message}\n")
    sys.stderr.flush()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
