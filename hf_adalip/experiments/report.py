"""A report of a study: its folder read, its tables and figures made, and two pages written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import UsageError
from ..files import whole
from ..plots import save_figure
from ..version import __version__
from . import figures, tables
from .report_pages import (
    Block,
    Bullets,
    CaptionedTable,
    Details,
    Heading,
    Image,
    Paragraph,
    anchor,
    as_html,
    as_markdown,
)
from .report_study import Arm, StudyResults, Trial, read_study
from .study import CONSTANT

MEASURED = "How this was measured"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Writes report.html, report.md and the pictures of a study.

    Args:
        folder: the study's, with study.yaml and results.jsonl.
        output: where to write, made if it is not there; None for `folder`/report. What a report
            wrote there before is replaced.

    Returns:
        the path of report.html, which has the pictures inside.

    Raises:
        UsageError: if the folder has no study, no run of it has ended, or `output` is a file.
        ImportError: without what is needed, naming the extra that has it.
    """
    study = read_study(folder)
    output = output or folder / "report"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be made: {error.strerror}") from error
    blocks = report(study, output)
    page = output / "report.html"
    _write(page, as_html(blocks))
    _write(output / "report.md", as_markdown(blocks))
    return page


def _write(path: Path, text: str) -> None:
    whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def report(study: StudyResults, output: Path) -> list[Block]:
    """The blocks of a report; the pictures are written to `output`."""
    blocks: list[Block] = [Heading(1, f"Report of the study {study.name}"), *_state(study)]
    missing: list[str] = []
    for schedule in study.schedules:
        several = len(study.schedules) > 1
        arms = study.arms(schedule)
        where = f"{_scale(study)}{f', schedule {schedule}' if several else ''}."
        with_it = f" (schedule: {schedule})" if several else ""
        blocks.append(Heading(2, f"What S changes{with_it}"))
        blocks += _comparisons(study, schedule, arms, where)
        blocks.append(Heading(2, f"Tables{with_it}"))
        blocks += _tables(study, schedule, arms, where)
        blocks.append(Heading(2, f"Figures{with_it}"))
        prefix = f"{anchor(schedule)}_" if several else ""
        for picture in figures.draw(study, schedule, arms):
            if isinstance(picture, figures.Missing):
                missing.append(f"{picture.title}: {picture.reason}.")
            else:
                blocks.append(_image(picture, output / f"{prefix}{picture.name}.png", where))
    if missing:
        blocks += [Heading(2, "Figures that are not drawn"), Bullets(list(dict.fromkeys(missing)))]
    return blocks + _how(study)


def _scale(study: StudyResults) -> str:
    """What every caption says: data and size, and how much of the study is there."""
    there, expected = _progress(study)
    part = f"; {there:,} of {expected:,} runs are there" if there < expected else ""
    return f"{study.measured}{part}"


def _progress(study: StudyResults) -> tuple[int, int]:
    """How many runs have ended, and how many there are to be."""
    return len(study.trials), study.planned


def _state(study: StudyResults) -> list[Block]:
    """How much of the study is there, and how it ended."""
    there, expected = _progress(study)
    found = Counter(trial.outcome for trial in study.trials)
    ended = ", ".join(f"{found[kind]} {kind}" for kind in ("complete", "diverged", "failed"))
    of = f"{there:,} of {expected:,} runs have ended"
    state = f"{of}: {ended}." if there < expected else f"{there:,} runs: {ended}."
    if there < expected:
        state += " The study is not finished: every number here may change."
    if study.other_seeds:
        state += f" {study.other_seeds} more, of seeds that study.yaml does not name, are left out."
    lines = [f"{study.measured}.", state]
    if paper := study.benchmark:
        lines.append(
            f"The paper's scale: {paper.train_samples:,} training images, {paper.train_epochs} "
            f"epochs (of the published experiments), {paper.seeds} seeds."
        )
    if study.scale:
        lines.insert(0, f"Scale of the study: {study.scale}.")
    lines.append(f"Commands, data, seeds and versions are under “{MEASURED}”.")
    return [Paragraph(line) for line in lines]


def _comparisons(
    study: StudyResults, schedule: str, arms: Sequence[Arm], where: str
) -> list[Block]:
    """With S against without: in sentences, then in numbers."""
    pairs = tables.pair_comparisons(study, schedule)
    peers = tables.peer_comparisons(study, arms)
    blocks: list[Block] = []
    if pairs:
        table = tables.comparison_table(study, "Forms, bases and controls", pairs)
        blocks += [
            Paragraph(f"Differences of {study.metric.words}. {tables.CONTROL}"),
            Bullets(tables.pair_sentences(study, schedule)),
            CaptionedTable(table, where),
        ]
    else:
        blocks.append(Paragraph("No form has a run to be compared with its base."))
    if peers:
        title = "Forms and peers" if any(arm.role == "form" for arm in arms) else "Peers"
        table = tables.comparison_table(study, title, peers)
        blocks.append(CaptionedTable(table, where))
    return blocks


def _tables(study: StudyResults, schedule: str, arms: Sequence[Arm], where: str) -> list[Block]:
    printed = schedule == CONSTANT
    found = tables.paper_tables(study, arms, printed)
    if (test := tables.test_table(study, arms, printed)) is not None:
        found.append(test)
    found.append(tables.arms_table(study, arms))
    rates = [tables.rate_table(study, pair, schedule) for pair in study.pairs_with(schedule)]
    found += [table for table in rates if table is not None]
    found.append(tables.runs_table(study, arms))
    return [CaptionedTable(table, where) for table in found]


def _image(picture: figures.Picture, path: Path, where: str) -> Image:
    whole(path, lambda partial: save_figure(picture.figure, partial))
    caption = f"{picture.title}. {where} {picture.note}"
    return Image(path.name, path.read_bytes(), picture.alt, caption)


_VARIED = re.compile(r"--(learning_rate|seed|output_dir)=(\S+)")


def _how(study: StudyResults) -> list[Block]:
    """Commands, data, seeds and versions: what is needed to get the numbers again."""
    finished = [trial for trial in study.trials if trial.results]
    seeds = sorted({trial.seed for trial in study.trials})
    seconds = sum(trial.seconds or 0.0 for trial in study.trials)
    items = [
        *([f"Study: {study.description.strip()}"] if study.description else []),
        f"Runs, as far as study.yaml tells the command: `{study.command}`",
        f"This report: `hf-adalip report {study.folder}` of hf-adalip {__version__}",
        f"Script: `{study.script or 'not named'}`",
        f"Data fingerprint: {_distinct(t.results.get('dataset_fingerprint') for t in finished)}",
        f"Seeds: {', '.join(map(str, seeds))}",
        *_grids(study),
        f"Device: {_distinct(t.results.get('device') for t in finished)}",
        f"Time of the runs, added up: {seconds / 3600:.2f} hours",
        f"Versions: {_versions(finished)}",
    ]
    if study.run_again:
        items.append(f"Runs that were run again, the last of which counts: {study.run_again}")
    blocks: list[Block] = [Heading(2, MEASURED), Bullets(items)]
    if failed := [trial for trial in study.trials if trial.outcome == "failed"]:
        lines = [f"{_name(trial)}: {trial.error or 'no reason given'}" for trial in failed]
        blocks.append(Details(f"Errors of runs that failed ({len(failed)})", lines))
    lines = list(_commands(study.trials))
    blocks.append(Details(f"Commands of all runs ({len(study.trials)})", lines))
    return blocks


def _commands(trials: Sequence[Trial]) -> Iterator[str]:
    """Each command once, followed by the learning rates and seeds it was run with."""
    runs: dict[str, dict[str, list[str]]] = {}
    for trial in trials:
        given = dict(_VARIED.findall(trial.command))
        command = _VARIED.sub(lambda match: f"--{match[1]}={match[1].upper()}", trial.command)
        seed = given.get("seed", str(trial.seed))
        if trial.outcome != "complete":
            seed += f" ({trial.outcome})"
        rate = given.get("learning_rate", f"{trial.learning_rate:g}")
        runs.setdefault(command, {}).setdefault(rate, []).append(seed)
    for command, seeds in runs.items():
        yield command
        for rate, those in seeds.items():
            yield f"    LEARNING_RATE {rate}: SEED {', '.join(those)}"


def _grids(study: StudyResults) -> list[str]:
    """The learning rates of every optimizer."""
    found = []
    for schedule in study.schedules:
        with_it = "" if schedule == CONSTANT else f" ({schedule})"
        for arm in study.arms(schedule):
            if arm.role != "control":
                rates = ", ".join(f"{rate:g}" for rate in arm.learning_rates)
                found.append(f"Learning rates of {arm.label}{with_it}: {rates}")
    return found


def _name(trial: Trial) -> str:
    return f"{trial.role} {trial.optimizer}, lr {trial.learning_rate:g}, seed {trial.seed}"


def _distinct(values: Iterable[object]) -> str:
    """The different values, and how many runs have each if there are several."""
    found = Counter(str(value) for value in values if value is not None)
    if not found:
        return "not in the results"
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{value} ({count} runs)" for value, count in found.most_common())


def _versions(trials: Sequence[Trial]) -> str:
    given = [v for t in trials if isinstance(v := t.results.get("versions"), dict)]
    names = dict.fromkeys(name for versions in given for name in versions)
    found = [f"{name} {_distinct(versions.get(name) for versions in given)}" for name in names]
    return ", ".join(found) or "not in the results"
