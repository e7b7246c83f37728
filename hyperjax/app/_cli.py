"""The `hyperjax` command."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from . import _hosts
from ._errors import AppError
from ._output import Output, silent
from ._settings import EXCHANGES, METHODS, Settings, describe, dump, make_settings

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: `check` found a fault; 2: bad input; 3: stopped, resumable.

    Of several processes that run it as one, each ends with the same code; see `_hosts.abandon`.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _prepare_jax(args)
    sys.path.insert(0, os.getcwd())  # where `module:task` is looked for, as with `python -m`
    try:
        if args.run in (_tune, _resume):
            _hosts.connect(args.coordinator, args.processes, args.process)
        return args.run(args, Output(as_json=args.json) if _hosts.primary() else silent())
    except AppError as error:
        if args.debug:
            raise
        print(f"hyperjax: {error}", file=sys.stderr)
        return _hosts.abandon(BAD_INPUT)
    except BrokenPipeError:  # `hyperjax ... | head`
        return _quiet()
    except OSError as error:
        if args.debug:
            raise
        _quiet()  # it may be standard output that fails
        print(f"hyperjax: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return _hosts.abandon(BAD_INPUT)
    except KeyboardInterrupt:
        print("hyperjax: stopped", file=sys.stderr)
        return _hosts.abandon(INTERRUPTED)
    except RuntimeError as error:
        if not _hosts.is_lost(error):
            raise
        print(f"hyperjax: {_hosts.farewell(error)}", file=sys.stderr)
        return _hosts.abandon(INTERRUPTED)


def _quiet() -> int:
    """Nobody reads standard output any more: write the rest of it nowhere."""
    with contextlib.suppress(io.UnsupportedOperation):  # it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE


def _prepare_jax(args: argparse.Namespace) -> None:
    """One CPU device per core, and compiled programs kept between runs; before JAX starts."""
    import jax

    if "JAX_NUM_CPU_DEVICES" not in os.environ and "XLA_FLAGS" not in os.environ:
        jax.config.update("jax_num_cpu_devices", _hosts.cores())
        # One program at a time: two that both sum over these devices can take each other's threads,
        # and XLA ends the process after waiting for 40 s.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "hyperjax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _tune(args: argparse.Namespace, out: Output) -> int:
    from ._folder import Folder, create

    given = {
        name: getattr(args, name)
        for name in ("task", "method", "members", "seeds", "seed", "exchange", "data_dir")
        if getattr(args, name) is not None
    }
    if args.data_dir:  # so that `resume` finds it from any folder
        given["data_dir"] = str(Path(args.data_dir).absolute())
    settings = make_settings(given, args.set)
    from ._study import load_task, members_mesh

    load_task(settings)  # a wrong name or missing data is said before a folder is made
    members_mesh(settings)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{settings.task.replace(':', '.')}-{settings.method}-{stamp}"
    path = Path(args.out) if args.out else Path("runs") / name
    if _hosts.several() and not args.out:  # the clocks of two hosts differ
        raise AppError("--out DIR is needed with several processes, the same for all.")
    _hosts.check_same("settings", dump(settings))
    _hosts.on_primary(lambda: create(path, settings, "tune"))
    return _carry_on(Folder(path), settings, out)


def _resume(args: argparse.Namespace, out: Output) -> int:
    from ._folder import changes, open_run
    from ._study import for_devices_here

    folder, settings = open_run(args.folder)
    settings = for_devices_here(settings)
    if changed := changes(folder):
        out.warn(f"the last bits may differ from an uninterrupted run: {changed}")
    return _carry_on(folder, settings, out)


def _carry_on(folder, settings: Settings, out: Output) -> int:
    from ._signals import Interrupted, stop_on_signals
    from ._study import run_study

    _hosts.check_shared(folder / "config.yaml")
    with stop_on_signals() as stop:
        try:
            out.line(f"run folder: {folder.path}")
            run_study(folder, settings, out, stop)
        except Interrupted:
            folder.event("interrupt", settings.updates)
            out.warn(f"stopped; continue with `hyperjax resume {folder.path}`")
            return INTERRUPTED
        except BrokenPipeError:
            _quiet()
            out.warn(f"output closed; continue with `hyperjax resume {folder.path}`")
            return _hosts.abandon(INTERRUPTED)
    return DONE


def _replay(args: argparse.Namespace, out: Output) -> int:
    from ._replay import replay

    return replay(args.folder, args.seed, args.member, out)


def _report(args: argparse.Namespace, out: Output) -> int:
    from ._folder import open_run
    from ._study import report

    folder, _ = open_run(args.folder)
    report(folder, out)
    return DONE


def _check(args: argparse.Namespace, out: Output) -> int:
    from ._check import check
    from ._study import load_task

    settings = Settings(task=args.task, data_dir=args.data_dir or "")
    return check(load_task(settings), out, steps=args.steps)


def _estimators(args: argparse.Namespace, out: Output) -> int:
    from ._contest_show import estimators
    from ._study import load_task

    task = load_task(Settings(task=args.task, data_dir=args.data_dir or ""))
    return estimators(
        task,
        out,
        steps=args.steps,
        draws=args.draws,
        warmup=args.warmup,
        seed=args.seed,
        tolerance=args.tolerance,
        budget=args.budget,
        precision="float64" if args.float64 else "task",
        folder=args.out,
    )


def _export(args: argparse.Namespace, out: Output) -> int:
    from ._export import export

    return export(args.folder, args.to, out, target=args.target)


def _compare(args: argparse.Namespace, out: Output) -> int:
    from ._compare import compare

    return compare(args.folders, out)


def _data(args: argparse.Namespace, out: Output) -> int:
    from ._datasets import data_path, list_data

    return (list_data if args.what == "list" else data_path)(args.data_dir, out)


def _doctor(args: argparse.Namespace, out: Output) -> int:
    from ._doctor import doctor

    return doctor(out)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like all others."""

    def error(self, message: str):
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="results as JSON on standard output")
    common.add_argument("--debug", action="store_true", help="tracebacks, not one-line errors")
    parser = _Parser(prog="hyperjax", description="Differentiable tuning in JAX.")
    parser.add_argument("--version", action="version", version=f"hyperjax {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    _add_tune(verb("tune", _tune, "tune a task and compare with random search and Optuna"))
    for name, run, text in (
        ("resume", _resume, "continue a run that was stopped or killed"),
        ("report", _report, "draw the plots and report.html of a run again"),
    ):
        sub = verb(name, run, text)
        sub.add_argument("folder", type=Path, metavar="RUN")
        if name == "resume":
            _add_hosts(sub)
    sub = verb("compare", _compare, "several runs in one table")
    sub.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    sub = verb("replay", _replay, "train once more under the schedule a member went through")
    sub.add_argument("folder", type=Path, metavar="RUN")
    sub.add_argument("--member", type=int, metavar="K", help="default: the best one")
    sub.add_argument("--seed", type=int, metavar="S", help="default: the first one of the run")
    sub = verb("check", _check, "hypergradients against finite differences, NaNs, memory")
    sub.add_argument("task", metavar="TASK|module:task")
    sub.add_argument("--steps", type=int, default=20, help="training steps to unroll (default 20)")
    sub.add_argument("--data-dir", metavar="DIR")
    _add_estimators(verb("estimators", _estimators, "every estimator on a task, and which to take"))
    sub = verb("export", _export, "a run for other tools")
    sub.add_argument("folder", type=Path, metavar="RUN")
    sub.add_argument("--to", required=True, choices=("csv", "optuna"))
    sub.add_argument("--target", type=Path, metavar="FILE")
    sub = verb("data", _data, "the data sets that tasks can use")
    sub.add_argument("what", choices=("list", "path"))
    sub.add_argument("--data-dir", metavar="DIR")
    verb("doctor", _doctor, "versions, devices, and a self-test")
    return parser


def _add_estimators(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("task", metavar="TASK|module:task")
    sub.add_argument("--steps", type=int, default=60, help="training steps (default 60)")
    sub.add_argument("--draws", type=int, default=8, help="of parameters and data (default 8)")
    sub.add_argument("--warmup", type=int, default=0, help="steps before those (default 0)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--tolerance", type=float, default=0.1, help="relative error allowed (default 0.1)"
    )
    sub.add_argument("--budget", metavar="BYTES", help="of temporary memory, as in 512MiB")
    sub.add_argument("--float64", action="store_true", help="compute in float64")
    sub.add_argument("--data-dir", metavar="DIR")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where JSON and picture go")


def _add_tune(sub: argparse.ArgumentParser) -> None:
    default = Settings()
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = "settings, with their defaults:\n" + describe()
    sub.add_argument("task", metavar="TASK|module:task", help="a wrong name lists all")
    sub.add_argument("--method", metavar="NAME", help=f"{', '.join(METHODS)} (default unroll)")
    sub.add_argument("--members", type=int, help=f"replicas per seed (default {default.members})")
    sub.add_argument("--seeds", type=int, help=f"independent studies (default {default.seeds})")
    sub.add_argument("--seed", type=int, help="the first seed; the others follow (default 0)")
    sub.add_argument("--exchange", metavar="NAME", help=f"{', '.join(EXCHANGES)}")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="see below; repeatable"
    )
    sub.add_argument("--data-dir", metavar="DIR", help="where a9a, mnist, ... are")
    sub.add_argument("--out", metavar="DIR", help="run folder (default runs/TASK-METHOD-TIME)")
    _add_hosts(sub)


def _add_hosts(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("several processes as one, each with this same command")
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 is; auto asks SLURM and others"
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="K", help="which one this is, from 0")
