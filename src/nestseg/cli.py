"""The command line: arguments in, one function call a verb.

Imports that need torch happen inside the verbs, so that help, recipe lists and typing errors answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nestseg.core.errors import NestsegError
from nestseg.version import __version__

if TYPE_CHECKING:
    from nestseg.recipe import Recipe

_MODEL_HELP = "a run folder, a model file of any known layout, a published name, or hf:owner/name@revision"


class _Parser(argparse.ArgumentParser):
    """argparse, with short errors: what is wrong and where the help is, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nsee: {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Describe every verb and option."""
    parser = _Parser(prog="nestseg", description="Semantic segmentation around ResNeSt backbones.")
    parser.add_argument("--version", action="version", version=f"nestseg {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    recipes = verbs.add_parser("recipes", help="list the recipes, or show one")
    recipes_verbs = recipes.add_subparsers(dest="recipes_verb", metavar="show", parser_class=_Parser)
    show = recipes_verbs.add_parser("show", help="print a resolved recipe as YAML")
    show.add_argument("recipe", metavar="NAME", help="a recipe name or a .yaml file")
    _add_set(show)

    train = verbs.add_parser("train", help="train a recipe")
    train.add_argument("recipe", metavar="NAME|RECIPE.yaml", help="what to train; see: nestseg recipes")
    train.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set (none for toystreets)")
    _add_dataset(train)
    train.add_argument(
        "--run",
        "--run-dir",  # torchrun takes --run for its own --run-path
        type=Path,
        dest="run",
        metavar="RUN",
        help="folder that the run is written to",
    )
    _add_set(train)
    train.add_argument("--max-steps", type=int, metavar="N", help="shorten the run and its schedule to N steps")
    train.add_argument("--init", metavar="MODEL", help=f"fine-tune {_MODEL_HELP}")
    train.add_argument(
        "--class-map",
        action="append",
        default=[],
        metavar="NEW=OLD",
        help="with --init: class NEW of the data set starts as class OLD of that model; may be repeated",
    )
    train.add_argument("--resume", action="store_true", help="continue the run in RUN from its newest checkpoint")
    train.add_argument("--allow-fresh", action="store_true", help="with --resume: begin where nothing was begun yet")
    train.add_argument("--accept-changes", action="store_true", help="with --resume: go on with a changed recipe")
    train.add_argument(
        "--strict-resume",
        action="store_true",
        help="with --resume: refuse to go on where versions, data, devices or threads have changed",
    )
    train.add_argument(
        "--auto-accumulate", action="store_true", help="run a batch in as many parts as memory needs, the same gradient"
    )
    train.add_argument("--dry-run", action="store_true", help="print the plan: size, memory, time; write nothing")
    train.add_argument("--devices", type=int, metavar="N", help="train on N devices of this machine")
    _add_device(train)

    tune = verbs.add_parser("tune", help="search over fields of a recipe")
    tune.add_argument("recipe", metavar="NAME|RECIPE.yaml", help="what to train; see: nestseg recipes")
    tune.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set (none for toystreets)")
    _add_dataset(tune)
    tune.add_argument("--study", type=Path, required=True, metavar="DIR", help="folder of the study, new or begun")
    tune.add_argument("--trials", type=int, required=True, metavar="N", help="finished and pruned trials in all")
    tune.add_argument(
        "--space",
        action="append",
        default=[],
        metavar="FIELD=SPEC",
        help="what to search: FIELD=log LOW HIGH, uniform LOW HIGH, int LOW HIGH or choice A B ...; may be repeated "
        "(default: learning rate, weight decay, dropout)",
    )
    _add_set(tune)
    tune.add_argument("--max-steps", type=int, metavar="N", help="shorten each trial and its schedule to N steps")
    _add_device(tune)

    evaluate = verbs.add_parser("evaluate", help="score a trained model on a split")
    evaluate.add_argument("model", metavar="RUN|MODEL", help=_MODEL_HELP)
    evaluate.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set (none for toystreets)")
    evaluate.add_argument("--split", metavar="SPLIT", help="which part of it (default: the recipe's, mostly val)")
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: evaluation beside the model file, or here for a published name",
    )
    evaluate.add_argument(
        "--submission", type=Path, metavar="DIR", help="write label maps for the benchmark's server, and score nothing"
    )
    evaluate.add_argument(
        "--skip-bad", action="store_true", help="score the rest where files are bad; the result is marked PARTIAL"
    )
    _add_set(evaluate, "change how the model is scored: evaluation.FIELD=VALUE")
    _add_device(evaluate)

    compare = verbs.add_parser("compare", help="is the difference of two models more than chance?")
    compare.add_argument("models", nargs=2, metavar="RUN|MODEL", help=_MODEL_HELP)
    compare.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set (none for toystreets)")
    compare.add_argument("--split", metavar="SPLIT", help="which part of it (default: the first model's, mostly val)")
    compare.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures as JSON too")
    _add_set(compare, "change how both are scored: evaluation.FIELD=VALUE")
    _add_device(compare)

    predict = verbs.add_parser("predict", help="label pictures")
    predict.add_argument("model", metavar="RUN|MODEL", help=_MODEL_HELP)
    predict.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="picture files, or folders of them")
    predict.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets STEM.png and STEM_overlay.png")
    predict.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    predict.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="cap of pictures that are decoded whole: PNG, JPEG, WebP, BMP (default: 89478485)",
    )
    _add_set(predict, "change how the model is used: evaluation.FIELD=VALUE, such as evaluation.window=[512,512]")
    _add_device(predict)

    _add_data(verbs)
    _add_weights(verbs)
    _add_runs(verbs)

    demo = verbs.add_parser("demo", help="train, evaluate and draw a small model on drawn streets, in minutes")
    demo.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="RUN", help="default: %(default)s")
    for verb in (recipes, show, train, tune, evaluate, compare, predict, demo):
        _add_debug(verb)
    return parser


def _add_data(verbs: argparse._SubParsersAction[_Parser]) -> None:
    data = verbs.add_parser("data", help="data sets: prepare, verify, look at")
    data_verbs = data.add_subparsers(dest="data_verb", metavar="VERB", required=True, parser_class=_Parser)

    prepare = data_verbs.add_parser("prepare", help="unpack the official archives into the layout, with a manifest")
    prepare.add_argument("dataset", metavar="voc|ade20k|cityscapes|camvid", help="which data set")
    prepare.add_argument("--root", type=Path, required=True, metavar="ROOT", help="folder that gets it")
    source = prepare.add_mutually_exclusive_group()
    source.add_argument("--archives", type=Path, metavar="DIR", help="folder that holds the official archives")
    source.add_argument("--download", action="store_true", help="fetch what can be had without a login")

    init = data_verbs.add_parser("init", help="look at a folder of yours and write its data set file")
    init.add_argument("folder", type=Path, metavar="FOLDER", help="the folder that holds pictures and labels")
    init.add_argument("--out", type=Path, metavar="FILE.yaml", help="default: FOLDER/dataset.yaml")
    init.add_argument("--overwrite", action="store_true", help="replace the file if it exists")

    verify = data_verbs.add_parser("verify", help="find every problem in one pass, with a fix for each")
    verify.add_argument("dataset", metavar="NAME|DATASET.yaml", help="a name, or the file that describes yours")
    verify.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set")
    verify.add_argument("--split", action="append", default=[], metavar="SPLIT", help="default: all; may be repeated")
    verify.add_argument("--json", type=Path, metavar="OUT", help="write the report as JSON too")
    verify.add_argument("--num-workers", type=int, metavar="N", help="processes (default: one a core)")

    stats = data_verbs.add_parser("stats", help="classes, sizes, imbalance and weights to use, as a page with pictures")
    stats.add_argument("dataset", metavar="NAME|DATASET.yaml", help="a name, or the file that describes yours")
    stats.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set (none for toystreets)")
    stats.add_argument("--split", default="train", metavar="SPLIT", help="default: %(default)s")
    stats.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets index.html and stats.json")

    preview = data_verbs.add_parser("preview", help="draw what the network will see, labels overlaid")
    preview.add_argument("recipe", metavar="NAME|RECIPE.yaml", help="whose augmentation; see: nestseg recipes")
    preview.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set (none for toystreets)")
    preview.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets preview.png and preview.html")
    preview.add_argument("--num-images", type=int, default=12, metavar="N", help="default: %(default)s")
    _add_dataset(preview)
    _add_set(preview)

    pack = data_verbs.add_parser("pack", help="write a copy that trains faster; give its folder as --data")
    pack.add_argument("dataset", metavar="NAME|DATASET.yaml", help="a name, or the file that describes yours")
    pack.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set (none for toystreets)")
    pack.add_argument("--split", action="append", required=True, metavar="SPLIT", help="which; may be repeated")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets a folder a split")
    for verb in (data, prepare, init, verify, stats, preview, pack):
        _add_debug(verb)


def _add_weights(verbs: argparse._SubParsersAction[_Parser]) -> None:
    weights = verbs.add_parser("weights", help="published weights: list, fetch, inspect, convert")
    weights_verbs = weights.add_subparsers(dest="weights_verb", metavar="VERB", required=True, parser_class=_Parser)

    listing = weights_verbs.add_parser("list", help="what is published, and what fits it")

    fetch = weights_verbs.add_parser("fetch", help="get published weights into the cache, and check them")
    fetch.add_argument("name", metavar="NAME", help="see: nestseg weights list")
    fetch.add_argument("--from", dest="source", metavar="URL|FILE", help="another place that has the same file")

    inspect = weights_verbs.add_parser("inspect", help="say what a file is, which network it fits, and what is wrong")
    inspect.add_argument("model", metavar="FILE", help=_MODEL_HELP)
    inspect.add_argument("--keys", action="store_true", help="list every key, in the file's names and in ours")
    _add_layout(inspect)

    convert = weights_verbs.add_parser("convert", help="write a file in another layout")
    convert.add_argument("model", metavar="SRC", help=_MODEL_HELP)
    convert.add_argument("out", type=Path, metavar="DST", help="a .safetensors or .pth file")
    convert.add_argument(
        "--to",
        choices=("nestseg", "official", "mmseg", "ssseg", "encoding"),
        default="nestseg",
        help="default: nestseg",
    )
    convert.add_argument("--num-classes", type=int, metavar="K", help="start classifiers for K classes afresh")
    _add_layout(convert)
    for verb in (weights, listing, fetch, inspect, convert):
        _add_debug(verb)


def _add_runs(verbs: argparse._SubParsersAction[_Parser]) -> None:
    runs = verbs.add_parser("runs", help="run folders: list, compare, plot")
    runs_verbs = runs.add_subparsers(dest="runs_verb", metavar="VERB", required=True, parser_class=_Parser)
    listing = runs_verbs.add_parser("list", help="how far each run is, its best score, its size")
    listing.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs")
    compare = runs_verbs.add_parser("compare", help="recipes, scores, classes and versions side by side")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two or more run folders")
    plot = runs_verbs.add_parser("plot", help="curves of one or more runs as a page")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    plot.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page")
    for verb in (runs, listing, compare, plot):
        _add_debug(verb)


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        choices=("auto", "nestseg", "official", "timm", "mmseg", "ssseg", "encoding"),
        default="auto",
        help="of the file; auto recognises it by its keys",
    )
    parser.add_argument("--backbone", metavar="NAME", help="which network, where the keys fit two")
    parser.add_argument(
        "--output-stride", type=int, choices=(8, 16, 32), help="of the network; weights do not show it (default: 8)"
    )


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE.yaml",
        help="a data set of your own; NAME is then SEGMENTOR_BACKBONE-dSTRIDE",
    )


def _add_set(parser: argparse.ArgumentParser, what: str = "change a field of the recipe") -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="FIELD=VALUE",
        help=f"{what}; the value is read as YAML; may be repeated",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    choices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument("--device", choices=choices, default="auto", help="default: a GPU where there is one")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 an error that the user can mend, 2 wrong arguments, 3 some inputs failed,
        75 a run stopped at a checkpoint, 130 interrupted.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    # torchrun takes our --run for a short form of its own --run-path, unless "--" stands before our words; it hands
    # that "--" on to us
    words = words[1:] if words[:1] == ["--"] else words
    arguments = parser.parse_args(words, argparse.Namespace(words=words))
    if arguments.verb is None:
        parser.print_help()
        return 0
    debug: bool = arguments.debug
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning  # type: ignore[assignment]  # ignores file and line
            return _VERBS[arguments.verb](arguments)
    except NestsegError as error:
        if debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        # the reader of our output left; point stdout elsewhere so that the interpreter's last flush is silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        where = f" | {error.filename}" if error.filename else ""
        fix = "check the path, its permissions and the free space of the disk; --debug shows where it happened"
        sys.stderr.write(f"error: E-SYSTEM-001{where} | {error.strerror or error} | fix: {fix}\n")
        return 1


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if not category.__module__.startswith("nestseg."):
        return
    rank = _rank()
    if rank == "0" or getattr(category, "of_one_rank", False):
        # a terminal that is gone must not make an error of a warning
        with suppress(OSError):
            sys.stderr.write(f"warning: {message}\n" if rank == "0" else f"warning: rank {rank}: {message}\n")


def _recipes(arguments: argparse.Namespace) -> int:
    from nestseg.recipes import list_recipes, resolve_recipe

    if arguments.recipes_verb == "show":
        sys.stdout.write(resolve_recipe(arguments.recipe, arguments.overrides).to_yaml())
        return 0
    rows = [
        ("NAME", "SEGMENTOR", "BACKBONE", "STRIDE", "DATA SET", "LR/POLICY/BATCH/LENGTH", "MIOU %"),
        *list_recipes(),
    ]
    _write_table(rows)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from nestseg.recipes import start_overrides

    if arguments.run is None and not arguments.dry_run:
        return _refuse("name the folder of the run with --run")
    for option in ("allow_fresh", "accept_changes", "strict_resume"):
        if getattr(arguments, option) and not arguments.resume:
            return _refuse(f"--{option.replace('_', '-')} is for a run that is continued with --resume")
    if arguments.dry_run and (arguments.resume or arguments.auto_accumulate):
        return _refuse("--dry-run plans a run from its beginning, without --resume and --auto-accumulate")

    overrides = list(arguments.overrides)
    if arguments.max_steps is not None:
        overrides.append(f"schedule.max_steps={arguments.max_steps}")
    overrides += start_overrides(arguments.init, arguments.class_map)
    recipe, root, notes = _resolve(arguments, overrides)
    # with several devices, the process of the first one says them
    for note in notes if arguments.devices is None else ():
        _say(note)
    if arguments.dry_run:
        from nestseg.engine.dry_run import dry_run, format_dry_run

        _say(format_dry_run(dry_run(recipe, root, device=arguments.device, devices=arguments.devices or 1)))
        return 0
    if arguments.devices is not None:
        from nestseg.engine.launch import launch_devices

        return launch_devices(arguments.words, run=arguments.run, devices=arguments.devices)

    from nestseg.engine.stop import STOPPED_EXIT_CODE, RunStopped
    from nestseg.engine.train import train

    try:
        model = train(
            recipe,
            root,
            run=arguments.run,
            device=arguments.device,
            resume=arguments.resume,
            accept_changes=arguments.accept_changes,
            strict_resume=arguments.strict_resume,
            allow_fresh=arguments.allow_fresh,
            auto_accumulate=arguments.auto_accumulate,
            notes=notes,
        )
    except RunStopped as stopped:
        if _rank() == "0":
            with suppress(OSError):
                sys.stderr.write(f"{stopped}\n")
        return STOPPED_EXIT_CODE
    if _rank() == "0":
        _say(str(model))
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from nestseg.engine.stop import STOPPED_EXIT_CODE
    from nestseg.engine.tune import StudyStopped, study_notes, study_table, tune

    recipe, root, _ = _resolve(arguments, arguments.overrides)
    try:
        result = tune(
            recipe,
            root,
            study=arguments.study,
            trials=arguments.trials,
            space=arguments.space,
            max_steps=arguments.max_steps,
            device=arguments.device,
            say=_say,
        )
    except StudyStopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return STOPPED_EXIT_CODE
    _write_table(study_table(result))
    for note in study_notes(result, root):
        _say(note)
    return 0


def _rank() -> str:
    """Place of this process among those that train one run; of what all would say, the first says it."""
    return os.environ.get("RANK", "0")


def _refuse(reason: str) -> int:
    sys.stderr.write(f"nestseg train: {reason}\nsee: nestseg train --help\n")
    return 2


def _resolve(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[Recipe, Path | None, list[str]]:
    """Return the recipe that is meant, the folder of its data, and why its derived values are what they are."""
    from nestseg.recipes import resolve_recipe

    if arguments.dataset is None:
        return resolve_recipe(arguments.recipe, overrides), arguments.data, []

    from nestseg.data.derive import derive_recipe
    from nestseg.data.opening import measure_dataset
    from nestseg.data.spec import DatasetSpec

    spec = DatasetSpec.read(arguments.dataset)
    root = arguments.dataset.parent if arguments.data is None else arguments.data
    facts = measure_dataset(spec, root)
    notes = [str(field) for field in derive_recipe(spec, facts)]
    return resolve_recipe(arguments.recipe, overrides, spec=spec, facts=facts), root, notes


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.submission is not None:
        return _submit(arguments)
    from nestseg.engine.evaluate import format_scores
    from nestseg.engine.evaluate_model import evaluate_model
    from nestseg.engine.evaluation_files import REPORT_FILE

    result = evaluate_model(
        arguments.model,
        arguments.data,
        split=arguments.split,
        out=arguments.out,
        skip_bad=arguments.skip_bad,
        overrides=arguments.overrides,
        device=arguments.device,
        on_image=_show_count,
    )
    for error in result.skipped:
        sys.stderr.write(f"error: {error}\n")
    _say(format_scores(result))
    assert result.folder is not None, "the command writes results"
    _say(f"report: {result.folder / REPORT_FILE}")
    return 3 if result.skipped else 0


def _submit(arguments: argparse.Namespace) -> int:
    from nestseg.engine.submit import submit_model

    if arguments.split is None or arguments.skip_bad or arguments.out is not None:
        sys.stderr.write("nestseg evaluate: --submission takes --split, and neither --skip-bad nor --out\n")
        return 2
    submission = submit_model(
        arguments.model,
        arguments.data,
        split=arguments.split,
        folder=arguments.submission,
        overrides=arguments.overrides,
        device=arguments.device,
        on_image=_show_count,
    )
    _say(f"{submission.num_images} label maps in {submission.folder}, not scored; {submission.upload}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from nestseg.engine.compare import compare_models, format_comparison

    comparison = compare_models(
        arguments.models[0],
        arguments.models[1],
        arguments.data,
        split=arguments.split,
        out=arguments.out,
        overrides=arguments.overrides,
        device=arguments.device,
        on_image=_show_count,
    )
    _say(format_comparison(comparison))
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from PIL import Image

    from nestseg.build import load_predictor
    from nestseg.core.image_io import MAX_PIXELS
    from nestseg.engine.predict import predict_files

    predictor = load_predictor(arguments.model, device=arguments.device, overrides=arguments.overrides)
    max_pixels = MAX_PIXELS if arguments.max_pixels is None else arguments.max_pixels
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow has one of its own
    result = predict_files(
        predictor,
        arguments.inputs,
        out=arguments.out,
        overwrite=arguments.overwrite,
        max_pixels=max_pixels,
        on_file=lambda file: _say(str(file)),
        on_note=_note,
    )
    for file in result.skipped:
        sys.stderr.write(f"skipped {file}: its outputs exist; replace them with --overwrite\n")
    for error in result.failed:
        sys.stderr.write(f"error: {error}\n")
    return 3 if result.failed else 0


def _data(arguments: argparse.Namespace) -> int:
    if arguments.data_verb == "init":
        from nestseg.data.init import init_dataset

        file, inspection = init_dataset(arguments.folder, out=arguments.out, overwrite=arguments.overwrite)
        for field, words in inspection.conclusions:
            _say(f"{field}: {words}")
        _say(str(file))
        return 0
    if arguments.data_verb == "prepare":
        from nestseg.data.prepare import format_prepared, prepare_dataset

        prepared = prepare_dataset(
            arguments.dataset,
            arguments.root,
            archives=arguments.archives,
            download=arguments.download,
            on_progress=_show_progress,
        )
        _say(format_prepared(prepared))
        return 0
    if arguments.data_verb == "verify":
        return _verify(arguments)
    if arguments.data_verb == "stats":
        from nestseg.data.opening import open_dataset
        from nestseg.report.data_page import format_summary, write_data_report

        stats = write_data_report(
            open_dataset(arguments.dataset, arguments.data, arguments.split),
            arguments.out,
            split=arguments.split,
            on_progress=_show_count,
        )
        _say(format_summary(stats))
        _say(f"page: {arguments.out / 'index.html'}")
        return 0
    if arguments.data_verb == "pack":
        from nestseg.data.opening import open_dataset
        from nestseg.data.packed import format_summary as format_pack
        from nestseg.data.packed import pack_dataset

        for split in arguments.split:
            dataset = open_dataset(arguments.dataset, arguments.data, split)
            _say(format_pack(pack_dataset(dataset, arguments.out, split=split, on_progress=_show_count)))
        return 0
    from nestseg.engine.preview import preview_recipe

    recipe, root, _ = _resolve(arguments, arguments.overrides)
    for file in preview_recipe(recipe, root, out=arguments.out, num_images=arguments.num_images):
        _say(str(file))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from nestseg.data.verify import Report, format_report, verify_named, write_report

    subject: Any = arguments.dataset
    verify: Any = verify_named
    root = arguments.data
    if arguments.dataset.endswith((".yaml", ".yml")):
        from nestseg.data.spec import DatasetSpec
        from nestseg.data.verify.verify import verify_custom

        subject, verify = DatasetSpec.read(Path(arguments.dataset)), verify_custom
        root = Path(arguments.dataset).parent if root is None else root
    report: Report = verify(
        subject,
        root,
        splits=arguments.split,
        num_workers=arguments.num_workers,
        on_progress=lambda done, total: _show_progress("pairs", done, total),
    )
    if arguments.json is not None:
        write_report(arguments.json, report)
    _say(format_report(report))
    return report.exit_code


def _weights(arguments: argparse.Namespace) -> int:
    if arguments.weights_verb == "list":
        from nestseg.weights.registry import WeightsRow, list_weights

        header = [field.upper().replace("_", " ") for field in WeightsRow._fields]
        _write_table([header, *list_weights()])
        return 0
    if arguments.weights_verb == "fetch":
        from nestseg.weights.registry import fetch_weights

        _say(str(fetch_weights(arguments.name, source=arguments.source, on_progress=_show_bytes)))
        return 0
    from nestseg.engine.weights import convert_weights, inspect_weights

    options = {
        "layout": arguments.layout,
        "backbone": arguments.backbone,
        "output_stride": arguments.output_stride,
    }
    if arguments.weights_verb == "inspect":
        inspection = inspect_weights(arguments.model, keys=arguments.keys, **options)
        _say(inspection.text)
        return 1 if inspection.problems else 0
    converted = convert_weights(
        arguments.model, arguments.out, to=arguments.to, num_classes=arguments.num_classes, **options
    )
    _say(converted)
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    from nestseg.engine.lock import lock_holder
    from nestseg.engine.runs import compare_runs, format_list, list_runs, plot_runs

    if arguments.runs_verb == "list":
        _say(format_list(list_runs(arguments.folder, lock_holder=lock_holder)))
    elif arguments.runs_verb == "compare":
        _say(compare_runs(arguments.runs, lock_holder=lock_holder))
    else:
        plot_runs(arguments.runs, arguments.out, lock_holder=lock_holder)
        _say(f"page: {arguments.out}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from nestseg.engine.demo import demo
    from nestseg.engine.evaluate import format_scores
    from nestseg.engine.evaluation_files import REPORT_FILE

    result = demo(arguments.run)
    run: Path = arguments.run
    _say(format_scores(result))
    _say(f"report: {run}/evaluation/{REPORT_FILE}; a predicted street: {run}/prediction")
    _say(f"next: nestseg predict {run} {run}/street.png --out labels")
    return 0


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _write_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def _show_bytes(done: int, total: int | None) -> None:
    if sys.stderr.isatty():
        whole = f" of {total / 1e6:.1f}" if total else ""
        sys.stderr.write(f"\r{done / 1e6:.1f}{whole} MB" + ("\n" if done == total else ""))


def _show_progress(what: str, done: int, total: int | None) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{what}: {done}{f' of {total}' if total else ''}\033[K" + ("\n" if done == total else ""))
        sys.stderr.flush()


def _show_count(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total} images" + ("\n" if done == total else ""))


_VERBS = {
    "recipes": _recipes,
    "train": _train,
    "tune": _tune,
    "evaluate": _evaluate,
    "compare": _compare,
    "predict": _predict,
    "data": _data,
    "weights": _weights,
    "runs": _runs,
    "demo": _demo,
}
