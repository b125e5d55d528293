"""Brings the finished rows of a sweep into docs/results, and makes the documents' tables of them.

python benchmarks/tables.py --workdir=runs/ablations/objectives --name=objectives
python benchmarks/tables.py

docs/results/NAME.json keeps the records; rows that are there from another run and not in this one
stay. --workdir may also be a plain run with an evaluation, such as runs/digits; its models join the
rows of a sweep that is there. Without --workdir the documents are made anew from what docs/results
has: every table between the lines <!-- table NAME --> and <!-- end --> in README.md and
docs/results.md. A table whose file is not there says that it was not run.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from linvideo_jax import command_line, loop
from linvideo_jax.errors import UserError
from linvideo_jax.folders import replacing
from linvideo_jax.report import chosen, tables

FLAGS = {
    "workdir": (None, "folder of a sweep or a run; without it the documents alone are made"),
    "name": (None, "of the table, for instance that of its configuration"),
    "root": (".", "the repository"),
}
DOCUMENTS = ("README.md", "docs/results.md")
PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def program(argv: Sequence[str]) -> None:
    """The program; UserError for wrong input."""
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    root = Path(given["root"])
    for name in DOCUMENTS:
        if not (root / name).exists():
            raise UserError(f"{root / name} does not exist: give the repository as --root.")
    results = root / "docs" / "results"
    if given["workdir"]:
        command_line.required(given, "name")
        bring(Path(given["workdir"]), results, given["name"])
    for name in DOCUMENTS:
        path = root / name
        text = path.read_text(encoding="utf-8")
        made = PLACE.sub(lambda found: filled(found, results), text)
        if made != text:
            with replacing(path) as temporary:
                temporary.write_text(made, encoding="utf-8")
            print(f"{path} has new tables.")


def bring(workdir: Path, results: Path, name: str) -> None:
    """Writes docs/results/NAME.json, and the pictures of profiles and of chosen layers."""
    path = results / f"{name}.json"
    before = loop.read_json(path) if path.exists() else None
    if (workdir / "table.json").exists():
        table = tables.finished(loop.read_json(workdir / "table.json"), before)
        for picture, svg in pictures(table, workdir).items():
            results.mkdir(parents=True, exist_ok=True)
            with replacing(results / f"{name}-{picture}.svg") as temporary:
                temporary.write_text(svg, encoding="utf-8")
    elif (workdir / "evaluate" / "metrics.json").exists():
        table = tables.of_run(loop.read_json(workdir / "evaluate" / "metrics.json"))
        if before is not None and tables.has_training(before):
            table = tables.joined(before, table)
    else:
        raise UserError(
            f"{workdir} has neither table.json nor evaluate/metrics.json: run train.py there first."
        )
    loop.write_json(path, table)
    print(f"{path} has {len(table['rows'])} rows.")


def pictures(table: tables.Table, workdir: Path) -> dict[str, str]:
    """SVGs by name: a profile for each row that has one, and the layers that scores chose."""
    runs = [run for row in table["rows"].values() for run in row["runs"]]
    found = {}
    for run in runs:
        path = workdir / "rows" / run["name"] / f"seed{run['seed']}" / "profile" / "profile.svg"
        if "profile" in run and path.exists():
            found[run["name"]] = path.read_text(encoding="utf-8")
    learned = [run for run in chosen.chose(runs) if "scores" in run["selection"]]
    if learned:
        path = workdir / "profile" / "profile.json"
        profile = loop.read_json(path) if path.exists() else None
        found["chosen"] = chosen.picture(learned, len(learned[0]["selection"]["scores"]), profile)
        if profile is not None:
            targets = sorted({run["selection"]["target"] for run in learned})
            table["agreement"] = {
                str(target): chosen.agreement(
                    [run for run in learned if run["selection"]["target"] == target], profile
                )
                for target in targets
            }
    return found


def filled(found: re.Match, results: Path) -> str:
    """The text of one place, with its table as it is now."""
    begin, name, end = found.groups()
    file, _, view = name.partition("/")
    path = results / f"{file}.json"
    if not path.exists():
        return f"{begin}Not run yet.\n{end}"
    text = tables.view(loop.read_json(path), view)
    if not view:
        for picture in sorted(results.glob(f"{file}-*.svg")):
            text += f"\n![{picture.stem}](results/{picture.name})\n"
    return f"{begin}{text}{end}"


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (program name first) and returns its exit code: 0, 2 or 130."""
    return command_line.run(program, argv, "give the same command again")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
