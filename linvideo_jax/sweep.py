"""The rows of a table: runs of one configuration with some fields changed, in one process.

    WORKDIR/{pairs, profile, teacher, table.json, table.md}
    WORKDIR/rows/NAME/seedN/{what a run writes, row.json}

`config.sweep` names the rows, `sweep_rows` picks some, `sweep_seeds` are each one's training seeds.
What does not depend on the row is made once: the collection and the profile (links in a row's
folder), the teacher's evaluation, and compilations, which JAX keeps by `Recipe`. Rows whose
training is the same share it. An interrupted sweep goes on; a row that diverges is recorded as
such, and the others go on. Several processes, each with a GPU or a share of one, may run one sweep:
each takes rows that no other has.
"""

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from linvideo_jax import config_files, loop, stages, workdirs
from linvideo_jax.errors import UserError
from linvideo_jax.evaluation import fingerprint, judged_by
from linvideo_jax.parallel import hosts
from linvideo_jax.report import rows as records
from linvideo_jax.report import tables

# Made once for all rows, unless a row changes one of these fields or groups.
SHARED = {
    "pretrain": {"pretrain", "prompts", "dtype"},
    "collect": {"collect", "checkpoint", "prompts", "dtype"},
    "profile": {"profile", "collect", "checkpoint", "prompts", "dtype"},
}
FOLDERS = {"collect": "pairs", "profile": "profile"}
# A row trained under other values of these is the same row: groups, and fields of any group.
NOT_OF_TRAINING = ("evaluate", "mesh", *workdirs.TOP)
CADENCES = set(workdirs.FIELDS) - {"final_weights"}


class Row(NamedTuple):
    """One run: a row of the table with one training seed.

    config: with the row's changes; stages: those that it runs itself.
    """

    name: str
    seed: int
    changes: dict[str, Any]
    config: ConfigDict
    folder: Path
    stages: tuple[str, ...]

    @property
    def trained_by(self) -> str:
        """A hash of all that the training depends on."""
        values: dict[str, Any] = {"stages": self.stages}
        for group, own in self.config.to_dict().items():
            if isinstance(own, dict):
                own = {name: value for name, value in own.items() if name not in CADENCES}
            if group not in NOT_OF_TRAINING:
                values[group] = own
        return fingerprint(values)

    @property
    def evaluated_by(self) -> str:
        """A hash of the settings of the evaluation."""
        return fingerprint(judged_by(self.config.evaluate))


def run(config, workdir: Path) -> None:
    """Runs every row that is not finished, one seed of all rows first, and writes the table."""
    workdir = Path(workdir)
    rows = planned(config, workdir)
    for row in rows:
        check(row)
    once = tuple(
        stage
        for stage in config.stages
        if stage in SHARED and any(stage not in row.stages for row in rows)
    )
    stages.run(config_files.changed(config, {"stages": once}), workdir, wait=True)
    elsewhere = []
    for number, row in enumerate(rows, 1):
        print(f"row {number} of {len(rows)}: {row.name}, seed {row.seed}")
        # Hosts of one process group go through all rows together.
        alone = workdirs.held(row.folder, ".row") if not hosts.several() else nullcontext()
        try:
            with alone:
                run_row(row, workdir)
        except workdirs.Busy:
            elsewhere.append(row)
            continue
        write_table(config, workdir)
    print(f"{write_table(config, workdir)} has the table.")
    if elsewhere:
        names = ", ".join(f"{row.name} (seed {row.seed})" for row in elsewhere)
        print(f"Other processes had these rows: {names}.")


def write_table(config, workdir: Path) -> Path:
    """The table of the rows as far as they are, by one process at a time; its path."""
    with workdirs.held(workdir, ".table", wait=True):
        return tables.write(config, workdir)


def planned(config, workdir: Path) -> list[Row]:
    """The rows that `config` asks for; UserError for names or fields that cannot be."""
    names = [name for name, _ in config.sweep]
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name) or names.count(name) > 1:
            raise UserError(
                f"the sweep's row {name!r} cannot be a folder, or is there twice: name rows by "
                "letters, digits, underscores, hyphens and dots, each once."
            )
    picked = config.sweep_rows
    if unknown := [name for name in picked if name not in names]:
        raise UserError(f"sweep_rows names {unknown[0]}: the rows are {', '.join(names)}.")
    rows = []
    for seed in config.sweep_seeds:
        for name, changes in config.sweep:
            if picked and name not in picked:
                continue
            own = config_files.changed(config, {**changes, "seed": seed, "sweep": ()})
            if "evaluate" in own:
                teacher = own.get("teacher") or own.checkpoint
                theirs = fingerprint(teacher, own.evaluate.to_dict())
                own.evaluate.shared = str(workdir / "teacher" / theirs)
            folder = workdir / "rows" / name / f"seed{seed}"
            rows.append(Row(name, seed, dict(changes), own, folder, own_stages(own, changes)))
    return rows


def own_stages(config, changes: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages that a row runs itself: shared ones only where it changes what they depend on."""
    moved = {name.split(".")[0] for name in changes}
    return tuple(stage for stage in config.stages if stage not in SHARED or moved & SHARED[stage])


def check(row: Row) -> None:
    """UserError, with the row's name, for settings of its stages that cannot be.

    Also for a folder that holds this row under other settings. Nothing is written.
    """
    try:
        stages.check(config_files.changed(row.config, {"stages": row.stages}))
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from None
    before = records.read(row.folder)
    if before and before["trained_by"] != row.trained_by:
        raise UserError(
            f"{row.folder} holds this row under other settings: delete it, or choose another "
            "--workdir."
        )


def run_row(row: Row, workdir: Path) -> None:
    """Trains and evaluates a row as far as that is not done, and keeps `row.json` up to date."""
    record = records.read(row.folder) or {
        "name": row.name,
        "seed": row.seed,
        "changes": row.changes,
        "trained_by": row.trained_by,
        "status": "begun",
    }
    loop.write_json(row.folder / records.FILE, record)
    if record["status"] == "begun":
        record |= train(row, workdir)
        loop.write_json(row.folder / records.FILE, record)
        for stage in records.TRAINING:
            shutil.rmtree(row.folder / "state" / stage / "checkpoints", ignore_errors=True)
    if record["status"] != "trained" or "evaluate" not in row.stages:
        return
    if record.get("evaluated_by") != row.evaluated_by:
        stages.run(config_files.changed(row.config, {"stages": ("evaluate",)}), row.folder)
        record |= {"evaluated_by": row.evaluated_by, **records.evaluated(row.folder)}
        loop.write_json(row.folder / records.FILE, record)


def train(row: Row, workdir: Path) -> dict[str, Any]:
    """Runs the row's stages before `evaluate`; what its record says of them.

    status: "trained", or "diverged" with the step.
    """
    training_stages = tuple(stage for stage in row.stages if stage != "evaluate")
    if twin := trained_alike(row, workdir):
        for name in ("final", "state", "selection.json", "profile"):
            if (twin / name).exists():
                link(row.folder / name, twin / name)
        return records.read(twin) | {"name": row.name, "changes": row.changes}
    for stage, name in FOLDERS.items():
        if stage not in row.stages and (workdir / name).exists():
            link(row.folder / name, workdir / name)
    try:
        stages.run(config_files.changed(row.config, {"stages": training_stages}), row.folder)
    except loop.Diverged as error:
        print(f"{row.name}: {error}")
        return {"status": "diverged", "diverged_at": error.step}
    return {"status": "trained", **records.trained(row.config, row.folder)}


def trained_alike(row: Row, workdir: Path) -> Path | None:
    """The folder of another row of the same training that is done."""
    for path in sorted(Path(workdir).glob(f"rows/*/*/{records.FILE}")):
        record = records.read(path.parent)
        if record["trained_by"] == row.trained_by and record["status"] == "trained":
            return path.parent
    return None


def link(path: Path, to: Path) -> None:
    """A relative link, so that WORKDIR can be moved."""
    if not path.is_symlink():
        path.symlink_to(os.path.relpath(to.resolve(), path.parent.resolve()))
