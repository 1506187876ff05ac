"""``lcsc images``: models side by side, from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcsc_opt.base.study_spec import ModelKind
from lcsc_opt.cli.options import Steps, Storage, assignments, chosen_storage, in_order_of
from lcsc_opt.cli.output import say


def images(
    shown: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT|STUDY_FILE|CHECKPOINTS",
            help="A stored experiment, a study file, or a folder or glob of checkpoints.",
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Of checkpoints, what makes images, as pipeline=FOLDER 'prompts=[a red fox, an owl]'; of a study file "
            "overrides. Or further checkpoints, where the shell expands a glob.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these rows: checkpoints, step:N, last:N, uniform, ema:RATE, power:WIDTH; of an experiment also "
            "answer, finalists or a study. May be repeated."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--images", min=1, max=64, help="Images of each model. Default: 4 to 8.")
    ] = None,
    kind: Annotated[
        ModelKind | None, typer.Option(help="What the checkpoints are of. Default: LoRAs and model folders are known.")
    ] = None,
    steps: Steps = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The picture. Default: NAME-images.png; of an experiment NAME-models.png."),
    ] = None,
    storage: Storage = None,
) -> None:
    """Show checkpoints, averages or what searches found side by side: one row each, the same noise and prompts.

    Nothing is scored, so neither real images nor a study file are needed. Of a stored experiment, the picture is on the
    dashboard's Images page, too.
    """
    from lcsc_opt.base.catalog import find
    from lcsc_opt.base.errors import LcscError, StudySpecError
    from lcsc_opt.base.files import write_atomically
    from lcsc_opt.database.opened import Database

    if out is not None and out.suffix != ".png":
        raise StudySpecError(f"{out}: expected a file that ends in .png")
    url = chosen_storage(storage, shown)
    database = Database(url)
    is_stored = shown in database.contents.experiments

    from lcsc_opt.experiment import looking
    from lcsc_opt.exports.grid import grid_of

    further = [Path(text) for text in more or () if Path(text).exists()]
    settings = [text for text in more or () if Path(text) not in further]
    names = model or ()
    if is_stored and (more or kind is not None or steps is not None):
        raise StudySpecError(
            f"{shown}: is a stored experiment, which has settings of its own; for the checkpoints of this name write "
            f"./{shown}, for the experiment leave out everything but --model and --images"
        )
    if is_stored:
        looked = looking.look_at_experiment(database, shown, names)
    elif Path(shown).suffix in (".yaml", ".yml"):
        looked = looking.look_at_study_file(find("studies", shown), settings, url, names)
    else:
        files = in_order_of(steps, [Path(shown), *further])
        looked = looking.look_at_checkpoints(kind, files, assignments(settings), url, steps=steps, models=names)
    picture = grid_of(looked.objective, looked.models, count)
    path = out or Path(f"{looked.name}-{'models' if is_stored else 'images'}.png")
    write_atomically(path, picture, error=LcscError)
    if is_stored:
        looking.keep_grid(database, shown, picture)
    say(f"{path}: {len(looked.models)} models, a row each; all images of a column come from the same noise")
