"""``lcsc_opt.search``: arguments in Python → the studies of a study file, run by the same coordinator.

What can be imported is named in the study as a study file would name it, and compared in the same way. Other functions
are handed over as objects. Nobody can compare these with what they were, so they begin a search of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lcsc_opt.base.catalog import find, load_file
from lcsc_opt.base.errors import StudySpecError
from lcsc_opt.base.imports import HANDED_OVER, importable_name
from lcsc_opt.base.inputs import read_arguments
from lcsc_opt.base.paths import SHIPPED, BuildContext
from lcsc_opt.base.progress import INTERRUPTED, each_notice_once, messages_by_default, notice
from lcsc_opt.base.settings import excerpt, parse_settings, plain
from lcsc_opt.base.study_file import parse_study_file
from lcsc_opt.base.study_spec import AUTO, Budget, BudgetSpec, Rule, experiment_name
from lcsc_opt.database.opened import Database
from lcsc_opt.database.states import Attributes
from lcsc_opt.database.urls import storage_url, url_of_file
from lcsc_opt.experiment.api import Study, TemporaryFolder
from lcsc_opt.experiment.result import Result
from lcsc_opt.objective.of_study import (
    CHECKPOINTS,
    ENOUGH_CHECKPOINTS,
    MANY_CHECKPOINTS,
    SELECT,
    ObjectiveLoader,
    found_checkpoints,
    say_found,
)
from lcsc_opt.trajectory import Trajectory
from lcsc_opt.trajectory.in_memory import by_step, pack_state_dicts, repeatable

if TYPE_CHECKING:
    from lcsc_opt.study.loop import TrialCallback

DEFAULT_FILE = "studies.db"

StateDictOfStep = Mapping[int, Mapping[str, Tensor]]
Checkpoints = str | Path | Trajectory | Sequence[str | Path] | StateDictOfStep | Sequence[Mapping[str, Tensor]]
Function = Callable[..., Any]


def search(
    checkpoints: Checkpoints,
    *,
    build: Function | str,
    score: Function | str | None = None,
    held_out: Function | str | int | None = None,
    sample: Function | str | None = None,
    reference: str | Path | Mapping[str, Any] | None = None,
    name: str | None = None,
    optimizers: str | Sequence[str | Mapping[str, Any]] | Mapping[str, Any] | None = None,
    space: str | Mapping[str, Any] | None = None,
    rows: Rule | None = AUTO,
    budget: Budget | None = None,
    storage: str | Path | None = DEFAULT_FILE,
    seed: int = 0,
    jobs: int = 1,
    resume: bool = False,
    accept_changes: bool = False,
    callbacks: Sequence[TrialCallback] = (),
    maximize: bool | None = None,
    size: int | None = None,
    image_shape: Sequence[int] | None = None,
    images: int | None = None,
    loss: str | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Search the linear combination of checkpoints whose merged model has the best score, or samples the best images.

    >>> import torch, lcsc_opt
    >>> checkpoints = {step: {"weight": torch.tensor([[0.0, step]])} for step in (1, 2, 3)}
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> result = lcsc_opt.search(checkpoints, build=net, score=lambda net: (net.weight[0, 1] - 5) ** 2, budget=30)
    >>> bool(result.merge()["weight"][0, 1] > 3)  # no average of the checkpoints is above 3
    True

    Functions at the top of a module or of a script are stored by their names. The same call again continues what is
    unfinished, also after Ctrl-C, and returns what is finished: a study is found again by its ``name``, and refused if
    the file of a function has changed. What else a function may be (a lambda, a closure, a method, one of a notebook)
    cannot be compared with what it was, nor can a network: then each call begins a new search, under the next free
    name, unless ``resume`` is given. ``lcsc dashboard``, ``lcsc compare`` and ``lcsc report`` read the same database.

    Args:
        checkpoints: files, a pattern, a folder, a packed trajectory (its path, or opened with all of its checkpoints);
            or state dicts, as ``{step: state_dict}`` or as a list, whose steps are then 1, 2, …
        build: called without arguments; returns the network, with any weights.
        score: called with the network that has the merged weights, in evaluation mode; returns one number, lower is
            better, or a mapping of metrics whose first is the score. A generator may yield the outcomes of single
            items, whose mean is the score. With a parameter ``draw`` it is told which data to use (docs/score.md), and
            the answer is chosen and reported on others than those of the search.
        held_out: how many images the report samples, or items of a score with a ``draw`` and a ``size``. For a score
            also a function like it, on data that no search sees: the table compares its values. If it returns single
            outcomes, every other one chooses the answer.
        sample: in place of ``score``, called with the network and noise ``[N, *image_shape]``; returns images
            ``[N, C, H, W]``, nominally in [-1, 1] and not clipped. It needs ``image_shape``.
        reference: for images, the real ones: a folder, a file or a data set, as in a study file.
        name: of the experiment in the database; by default that of the score's function.
        optimizers: a name, several, or mappings from a name to its options. The default is ``EMAGrid``, and
            ``LCSCGradient`` if the score has a gradient, else ``LCSCQuadratic``.
        space: of the coefficients, as in a study file: ``convex``. The default is ``affine``.
        rows: ``channels`` gives each output channel coefficients of its own, ``{"channels": 8}`` each eight of a
            tensor, ``layers`` each layer, ``None`` all weights the same. ``auto`` is ``channels`` for images and
            optimizers that follow the gradient of the loss, else ``None``.
        budget: a bound: evaluations of each optimizer; or a time for each, as ``"5 min"``, ``"90 s"``, ``"1 hour"`` or
            a ``timedelta``, for each search and grid. The report comes after it. A later call with more
            continues. By default ``LCSCGradient`` ends when it no longer gains, at the latest after 200 evaluations,
            and others after 100.
        storage: the file of the database, or its URL; ``LCSC_STORAGE`` replaces the default. With ``None`` nothing is
            kept: a temporary database lives as long as the result or one of its studies.
        seed: of everything random in the search.
        jobs: how many processes evaluate. They must be able to import ``build`` and ``score`` from a module.
        resume: continue the newest search of this name. That functions, network and data are those that it began with
            is then the caller's word, wherever they are not functions of a module or script.
        accept_changes: continue although functions, versions or settings have changed.
        callbacks: functions of an ``optuna.Study`` and a ``FrozenTrial``, called after each trial that ends now, as for
            :func:`lcsc_opt.run`.
        maximize: whether a higher score is better.
        size: how many items a ``draw`` of the search has, for a score that asks for it.
        image_shape: of the noise, ``(C, H, W)``.
        images: how many an evaluation of the search samples; 10,000 by default.
        loss: of images: ``fdr`` (the default), ``fid``, ``fid@EXTRACTOR``, or metric → weight.
        settings: what else the objective has, by the names of a study file: ``key`` (which state dict of each file),
            ``select`` (which checkpoints; by default 16 evenly spaced ones of more than 32 files, where images are
            sampled), ``classes`` and ``labels`` (of a ``sample`` that takes ``labels``), ``device``, ``dtype``,
            ``batch_size``, ``nfe``, ``keep`` and others (docs/reference.md).

    Raises:
        LcscError: the arguments, the checkpoints or the database cannot be used, a function raised an error, or a
            search failed or is run by another process; the line says what to do.
        Exception: what a callback raises.
    """
    if isinstance(checkpoints, Trajectory):
        count = len(Trajectory.open(checkpoints.path).steps)
        if len(checkpoints.steps) < count:  # a study opens its trajectory by the path alone
            raise StudySpecError(
                f"checkpoints: the trajectory was opened with {len(checkpoints.steps)} of its {count} checkpoints; "
                "open all of them, and choose with settings={'select': …}"
            )
        checkpoints = checkpoints.path
    with messages_by_default(), each_notice_once():
        options = read_arguments(
            "lcsc_opt.search",
            name=name,
            rows=rows,
            seed=seed,
            jobs=jobs,
            resume=resume,
            accept_changes=accept_changes,
            callbacks=callbacks,
            settings=settings,
        )
        named: dict[str, Any] = {
            "maximize": maximize,
            "size": size,
            "image_shape": image_shape,
            "images": images,
            "loss": loss,
            "reference": reference,
        }
        call = _Call(
            repeatable(checkpoints),
            build,
            score,
            held_out,
            sample,
            options.jobs,
            {key: plain(value) for key, value in named.items() if value is not None},
            options.settings or {},
        )
        temporary: TemporaryFolder | None = None
        if storage is None:
            temporary = TemporaryFolder()
            url = url_of_file(temporary.path / DEFAULT_FILE)
        else:
            # whoever names the default has most likely not chosen it, so LCSC_STORAGE counts
            url = storage_url(None if str(storage) == DEFAULT_FILE else storage)
        database = Database(url)
        contents = database.contents
        chosen_name = options.name or call.default_name
        if call.not_importable:  # such functions cannot be compared with those of an earlier call
            chosen_name = _numbered(chosen_name, contents.experiments, resume=options.resume)

        content = call.content(chosen_name, plain(optimizers), options.seed, options.jobs)
        if space is not None or options.rows != AUTO:
            content["space"] = _space(plain(space), options.rows)
        if budget is not None:
            content["budget"] = BudgetSpec.of(budget).model_dump(exclude_none=True)
        objectives = ObjectiveLoader(BuildContext(Path.cwd(), functions=call.functions, files=database.files))
        study_file = parse_study_file(content, source="lcsc_opt.search")
        found = found_checkpoints(study_file.objective, objectives.context)
        say_found(found)
        if sample is not None:
            call.select_enough(len(found), contents.experiments.get(chosen_name), are_default=optimizers is None)
        from lcsc_opt.experiment.outcome import REPEATED_CALL, RESUMED_CALL, SAME_CALL
        from lcsc_opt.experiment.running import experiment_of, run_studies, searches_of  # and with it Nevergrad

        searches_of([study_file])  # refuses what is wrong before any function is called
        call.place_checkpoints(database.files)
        study_file = parse_study_file(content, source="lcsc_opt.search")  # which names checkpoints in memory only now
        experiment = experiment_of(study_file, database, objectives, accept_changes=options.accept_changes)
        goes_on = SAME_CALL
        if temporary is not None:
            goes_on = REPEATED_CALL
        elif call.not_importable:
            goes_on = RESUMED_CALL
        try:
            run_studies(experiment, callbacks=options.callbacks, how_to_continue=goes_on)
        except KeyboardInterrupt:
            if temporary is None:  # else the database ends with this call
                advice = "call search again with resume=True" if call.not_importable else "run the same call"
                notice(f"{INTERRUPTED}; {advice} to continue")
            raise
    studies = tuple(Study(name, url, call.functions, temporary) for name in experiment.specs)
    return Result(experiment.name, url, studies, content, call.not_importable, temporary is not None)


class _Call:
    """The arguments that describe the objective, checked as far as that is possible without calling anything.

    Args:
        checkpoints, build, score, held_out, sample, jobs: as of :func:`search`.
        named: settings of the objective that have an argument of their own.
        settings: others.

    Attributes:
        file: the objective's, in the catalog.
        settings: its settings; :meth:`place_checkpoints` adds checkpoints that are in memory.
        in_memory: state dicts by their steps, unless there are files.
        functions: name in the settings → function, of those that no process can import.
        not_importable: argument → what Python calls its function, of those.
        held_out: what the study file has under this key.
        default_name: of the experiment.

    Raises:
        StudySpecError: arguments exclude each other, are of another type, or cannot be imported where they must; a
            setting is unknown, or given twice; or a file of the user's hides the objective.
        TrajectoryError: the checkpoints are neither paths nor state dicts by their steps.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        build: Function | str,
        score: Function | str | None,
        held_out: Function | str | int | None,
        sample: Function | str | None,
        jobs: int,
        named: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        if (score is None) == (sample is None):
            raise StudySpecError("lcsc_opt.search: give either score, or sample and a reference of real images")
        functions_of: dict[str, tuple[str, Any]] = {"build": ("model", _builder(build))}  # argument → setting, function
        self.held_out: dict[str, int] = {}
        number = plain(held_out)
        if isinstance(number, int) and not isinstance(number, bool):
            if score is not None and "size" not in {**named, **settings}:
                raise StudySpecError(f"held_out: {number} is a number of items, as of a draw; give size, too")
            self.held_out["images"] = number
            held_out = None
        if score is None:
            if held_out is not None:
                raise StudySpecError(
                    f"held_out: with sample=, expected the report's number of images, got {excerpt(held_out)}"
                )
            named_after = sample
            self.file = "torch_module.py"
            functions_of["sample"] = ("sampler", sample)
        else:
            if "reference" in named:
                raise StudySpecError("reference: is only for sample=; leave it out with score=")
            named_after = score
            self.file = "score.py"
            functions_of["score"] = ("score", score)
            if held_out is not None:
                functions_of["held_out"] = ("held_out", held_out)
        names, self.functions, self.not_importable = _named(functions_of, jobs)
        given_settings = {**named, **names}
        argument_of = {setting: argument for argument, (setting, _) in functions_of.items()}
        for setting in settings:
            if setting in given_settings or setting == CHECKPOINTS:
                argument = argument_of.get(setting, setting)
                raise StudySpecError(
                    f"settings.{setting}: already given by the argument {argument}; leave one of them out"
                )
        self.settings: dict[str, Any] = {**settings, **given_settings}
        _check_not_hidden(self.file)
        settings_class = load_file(find("objectives", self.file)).Settings
        parse_settings(settings_class, {**self.settings, CHECKPOINTS: "not placed yet"}, source="lcsc_opt.search")
        function_name = getattr(named_after, "__name__", "search")
        self.default_name = experiment_name(function_name.replace("<lambda>", "search")) or "search"
        self.in_memory = by_step(checkpoints)
        if self.in_memory is None:
            paths = plain(checkpoints)
            if isinstance(paths, list) and len(paths) == 1:
                [paths] = paths  # as a study file names a single one
            self.settings[CHECKPOINTS] = paths

    def place_checkpoints(self, files: Path) -> None:
        """Pack checkpoints in memory into a folder, and put their path into :attr:`settings`.

        Raises:
            TrajectoryError: they cannot be packed.
        """
        if self.in_memory is not None:
            self.settings[CHECKPOINTS] = str(pack_state_dicts(self.in_memory, files))

    def select_enough(self, found: int, stored: Attributes | None, *, are_default: bool) -> None:
        """Select some of very many checkpoints, evenly spaced, unless the caller selects any: a notice says so.

        Args:
            found: how many there are.
            stored: the attributes of the experiment, which keeps those that it began with; ``None`` of a new one.
            are_default: whether the optimizers are the default ones, for which some are enough.
        """
        if SELECT in self.settings:
            return
        enough = {"count": ENOUGH_CHECKPOINTS}
        if stored is not None:
            if stored["objective"]["settings"].get(SELECT) == enough:
                self.settings[SELECT] = enough
        elif are_default and found > MANY_CHECKPOINTS:
            self.settings[SELECT] = enough
            notice(
                f"of these, {ENOUGH_CHECKPOINTS} evenly spaced ones are used, which are enough for a search along the "
                f"gradient; without a gradient more are better: settings={{'{SELECT}': {{'count': {found}}}}} uses all"
            )

    def content(self, name: str, optimizers: Any, seed: int, jobs: int) -> dict[str, Any]:
        """What a study file would contain, without space and budget; without optimizers, if none are given.

        It shares :attr:`settings`, into which :meth:`place_checkpoints` puts the checkpoints later.
        """
        content: dict[str, Any] = {
            "name": name,
            "objective": {"file": self.file, "settings": self.settings},
            "seeds": [seed],
            "workers": jobs,
        }
        if optimizers is not None:
            content["optimizers"] = optimizers
        content["held_out"] = self.held_out
        return content


def _named(
    given: Mapping[str, tuple[str, Any]], jobs: int
) -> tuple[dict[str, str], dict[str, Function], dict[str, str]]:
    """Functions as settings name them.

    Args:
        given: argument → the setting that it gives, and the function or its name.
        jobs: how many processes must be able to import them.

    Returns:
        Setting → name; of functions that no process can import, name → function, and argument → what Python calls it.

    Raises:
        StudySpecError: something is no function, or other processes cannot import it.
    """
    settings: dict[str, str] = {}
    functions: dict[str, Function] = {}
    not_importable: dict[str, str] = {}
    only_here: dict[str, str] = {}  # argument → what Python calls its function, which no worker process can import
    for argument, (setting, function) in given.items():
        if isinstance(function, (str, Path)):
            settings[setting] = str(function)
            continue
        if not callable(function):
            raise StudySpecError(f"{argument}: expected a function, got {type(function).__name__}")
        described = getattr(function, "__qualname__", type(function).__name__)
        dotted = importable_name(function)
        if dotted is None:
            dotted = f"{HANDED_OVER}{argument}"
            functions[dotted] = function
            not_importable[argument] = described
        if argument in not_importable or function.__module__ == "__main__":  # a worker would run the script again
            only_here[argument] = described
        settings[setting] = dotted
    if jobs > 1 and only_here:
        listed_functions = " and ".join(f"{argument} ({text})" for argument, text in only_here.items())
        raise StudySpecError(
            f"jobs={jobs}: other processes cannot import {listed_functions}; move them into a module, or set jobs=1"
        )
    return settings, functions, not_importable


def _builder(build: Function | str) -> Function | str:
    """What makes the network; of a network itself, what returns it: the objective works on a copy."""
    if not isinstance(build, nn.Module):
        return build

    def network() -> nn.Module:
        return build

    network.__qualname__ = f"a {type(build).__name__}"  # by which messages name it
    return network


def _space(space: str | Mapping[str, Any] | None, rows: Rule | None) -> dict[str, Any]:
    """As a study file has it, with these rows unless it has rows itself.

    Raises:
        StudySpecError: it is neither a name nor a mapping; or both have rows.
    """
    if space is None:
        return {"rows": rows}
    if isinstance(space, str):
        return {"rows": rows, "kind": space}
    if not isinstance(space, Mapping):
        raise StudySpecError(f"space: expected a name or a mapping, got {excerpt(space)}")
    if "rows" not in space:
        return {"rows": rows, **space}
    if rows != AUTO:
        raise StudySpecError("rows: already given by the argument space; leave one of them out")
    return dict(space)


def _check_not_hidden(file: str) -> None:
    """Refuse to run a file of the user's that only has the name of ours.

    Raises:
        StudySpecError: the catalog finds such a file first.
    """
    path = find("objectives", file)
    if not path.samefile(SHIPPED / "objectives" / file):
        raise StudySpecError(f"{path}: hides the {file} of lcsc_opt: rename it, or call search in another folder")


def _numbered(name: str, experiments: Collection[str], *, resume: bool) -> str:
    """``NAME`` while no search has it; then, of ``NAME``, ``NAME-2``, …, the newest one to ``resume``, else the next.

    For functions that nobody can compare. The numbers have no gaps: a lone ``NAME-2024`` is a name that the user gave.
    A notice says that a number was added for a new search.
    """
    if name not in experiments:
        return name
    newest = name
    number = 2
    while f"{name}-{number}" in experiments:
        newest = f"{name}-{number}"
        number += 1
    if resume:
        return newest
    new = f"{name}-{number}"
    notice(
        f"{new}: starts a new search, because the functions cannot be compared with those of the earlier one "
        "(resume=True continues that one)"
    )
    return new
