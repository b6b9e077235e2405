"""A report of studies that are made here: its numbers, its two pages, and bad input."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_adalip import cli
from hf_adalip.errors import UsageError
from hf_adalip.experiments import figures, report, tables
from hf_adalip.experiments.report import write_report
from hf_adalip.experiments.report_study import StudyResults, read_study, shown

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
yaml = pytest.importorskip("yaml")

RATES = (0.01, 0.1, 1.0)
PEAKS = {  # role, learning rate: peak accuracy of seeds 0 to 2, and the epoch it is at
    ("base", 0.01): ((0.90, 0.92, 0.94), 4),
    ("base", 0.1): ((0.96, 0.98, 1.00), 2),
    ("base", 1.0): ((0.10, 0.10, 0.10), 1),  # diverged
    ("form", 0.01): ((0.92, 0.94, 0.96), 3),
    ("form", 0.1): ((0.97, 0.99, 1.00), 2),
    ("form", 1.0): ((0.98, 0.99, 0.96), 1),
    ("control", 0.01): ((0.92, 0.94, 0.96), 3),
    ("control", 0.1): ((0.97, 0.98, 0.97), 2),
}
SETTINGS = {
    "name": "paper_mnist",
    "scale": "3 seeds",
    "script": "recipes/mnist.py",
    "pairs": [{"base": "sgd", "form": "adalip", "learning_rates": list(RATES)}],
    "seeds": [0, 1, 2],
    "control": True,
    "metric": "best_train_accuracy",
}


def trial(role: str, rate: float, seed: int, peak: float, at: int) -> dict[str, Any]:
    diverged = peak == 0.10
    epochs = [
        {
            "epoch": float(epoch),
            "train_accuracy": peak if epoch >= at else peak / 2,
            "eval_accuracy": peak - 0.01 if epoch == at else 0.0,
            "train_loss": None if diverged else 1.0 / epoch,
        }
        for epoch in (1, 2, 3, 4)
    ]
    optimizer = "adalip" if role == "form" else "sgd"
    results = {
        "train_accuracy": peak,
        "train_loss": epochs[-1]["train_loss"],
        "epoch": 4.0,
        "train_samples": 10000,
        "dataset_name": "some/where/mnist",
        "dataset_fingerprint": "f1f2",
        "versions": {"torch": "2.14.1"},
        "optimizer_arguments": {"lr": rate},
        "epochs": epochs,
    }
    return {
        "study": "paper_mnist",
        "schedule": "constant",
        "optimizer": optimizer,
        "role": role,
        "pair": "sgd/adalip" if role == "control" else None,
        "learning_rate": rate,
        "seed": seed,
        "state": "failed" if diverged else "complete",
        "error": None,
        "seconds": 2.0,
        "command": f"python recipes/mnist.py --optim={optimizer} --learning_rate={rate:g} "
        f"--seed={seed} --output_dir={optimizer}-{rate:g}-{seed}",
        "median_scale": 0.5 + 0.1 * seed if role == "form" else None,
        "results": results,
    }


def trials() -> list[dict[str, Any]]:
    return [
        trial(role, rate, seed, peak, at)
        for (role, rate), (peaks, at) in PEAKS.items()
        for seed, peak in enumerate(peaks)
    ]


def write(folder: Path, lines: list[dict[str, Any]], settings: dict[str, Any] = SETTINGS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(settings))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of which two control runs failed or are missing, with its report."""
    lines = trials()
    failed = trial("control", 1.0, 0, 0.5, 1) | {"state": "failed", "error": "killed by signal 9"}
    write(path := tmp_path_factory.mktemp("study"), [*lines, failed | {"results": {}}])
    write_report(path)
    return path


@pytest.fixture(scope="module")
def study(folder: Path) -> StudyResults:
    return read_study(folder)


def column(table: tables.Table, *head: str) -> list[str]:
    place = table.head.index(head)
    return [row[place] for row in table.rows]


# Numbers


def test_table_2_by_hand(study: StudyResults) -> None:
    six, others = tables.paper_tables(study, study.arms("constant"), printed=True)
    assert six.title == "Table 2 of the paper"
    assert [row[0] for row in six.rows][:5] == [
        "peak train accuracy, max",
        "peak train accuracy, median",
        "peak train accuracy, mean",
        "peak train accuracy, std",
        "epochs, mean",
    ]
    accuracy = ["0.980", "0.920", "0.667", "0.401"]  # of 0.92, 0.98, 0.10
    assert column(six, "SGD", "here") == [*accuracy, "2", "2", "2", "≥ 3.333", "1 of 3"]
    assert column(six, "SGD", "paper")[:7] == ["1.0", "0.976", "0.663", "0.422", "4.5", "2.5", "2"]
    accuracy = ["0.990", "0.980", "0.970", "0.022"]  # of 0.94, 0.99, 0.98
    assert column(six, "AdaLip", "here") == [*accuracy, "1.5", "1.5", "1", "≥ 2.333", "2 of 3"]
    note = " ".join(six.notes)
    assert "Epochs to 0.9800, 98 % of the maximum peak" in note
    assert "SGD 7 of 9; AdaLip 5 of 9" in note
    assert column(others, "control of AdaLip", "")[:2] == ["0.970", "0.955"]


def test_table_5_by_hand(study: StudyResults) -> None:
    table = tables.test_table(study, study.arms("constant"), printed=True)
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["SGD"] == ["0.9700", "0.9203 to 1.0197", "0.1", "0.9896"]  # ± 4.303 × 0.02 / √3
    assert [rows["AdaLip"][i] for i in (0, 2, 3)] == ["0.9767", "0.1", "0.9909"]
    assert rows["control of AdaLip"][-1] == ""


def test_what_the_paper_leaves_out(study: StudyResults) -> None:
    table = tables.arms_table(study, study.arms("constant"))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["SGD"][0] == "0.1"
    assert rows["SGD"][4:] == ["0.1 alone, × 1", "–"]
    assert rows["AdaLip"][4:] == ["0.1 to 1, × 10 or more (high end of the grid)", "0.60"]


def test_differences_are_paired_by_seed(study: StudyResults) -> None:
    """By hand: at 0.01, 0.1, 1 the seeds differ by 0.02 0.02 0.02, 0.01 0.01 0, 0.88 0.89 0.86."""
    base, best, control, _ = tables.pair_comparisons(study, "constant")
    by_seed = [0.91 / 3, 0.92 / 3, 0.88 / 3]
    mean = sum(by_seed) / 3
    deviation = (sum((x - mean) ** 2 for x in by_seed) / 2) ** 0.5
    half = 4.30265273 * deviation / 3**0.5
    assert (base.what, base.at) == ("AdaLip − SGD", "mean over 3 learning rates")
    assert base.found.mean == pytest.approx(mean)
    assert base.found.low == pytest.approx(mean - half)
    assert (base.pairs, base.possible) == (9, 9)
    assert best.at == "best of each, 0.1 and 0.1"
    assert best.found.mean == pytest.approx(0.02 / 3)
    assert control.at == "mean over 2 of 3 learning rates"
    assert control.found.mean == pytest.approx((0.0 + 0.005 + 0.015) / 3)
    (sentence,) = tables.pair_sentences(study, "constant")
    assert "AdaLip − SGD, mean over 3 learning rates, +0.3011, 95 % interval" in sentence
    assert re.search(r"from 3 seeds, which does not include 0; AdaLip − its control", sentence)
    assert sentence.endswith("which includes 0.")


def test_seeds_that_have_just_begun_do_not_narrow_the_grid(tmp_path: Path) -> None:
    lines = [line for line in trials() if line["seed"] < 2 or line["learning_rate"] == 0.01]
    study = read_study(write(tmp_path, lines))
    base, *_ = tables.pair_comparisons(study, "constant")
    assert base.at == "mean over 3 learning rates"
    assert (base.found.size, base.pairs, base.possible) == (2, 6, 9)
    assert base.found.mean == pytest.approx((0.91 + 0.92) / 6)


def test_seeds_of_an_earlier_call_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, trials(), {**SETTINGS, "seeds": [0, 1]})
    study = read_study(folder)
    base, *_ = tables.pair_comparisons(study, "constant")
    assert (base.pairs, base.possible) == (6, 6)
    page = write_report(folder).with_suffix(".md").read_text(encoding="utf-8")
    assert "8 more, of seeds that study.yaml does not name, are left out." in page
    assert f"`hf-adalip sweep {folder / 'study.yaml'}`" in page  # paper_mnist has more optimizers
    with pytest.raises(UsageError, match="has no run of the seeds of"):
        read_study(write(tmp_path, trials(), {**SETTINGS, "seeds": [7]}))


def test_optimizers_without_a_form_are_compared(tmp_path: Path) -> None:
    lines = [line | {"role": "peer"} for line in trials() if line["role"] != "control"]
    study = read_study(write(tmp_path, lines, {**SETTINGS, "pairs": []}))
    (found,) = tables.peer_comparisons(study, study.arms("constant"))
    assert found.what in ("AdaLip − SGD", "SGD − AdaLip")
    text = "\n".join(map(str, report.report(study, tmp_path)))
    assert "title='Peers'" in text


def test_two_controls_of_one_form_have_epochs_of_their_own(tmp_path: Path) -> None:
    lines = [trial("base", 0.1, 0, 0.9, 1), trial("form", 0.1, 0, 0.9, 1)]
    for base, at in (("sgd", 2), ("momentum", 4)):
        control = {"optimizer": base, "pair": f"{base}/adalip"}
        lines.append(trial("control", 0.1, 0, 0.9, at) | control)
    pairs = [{"base": b, "form": "adalip", "learning_rates": [0.1]} for b in ("sgd", "momentum")]
    study = read_study(write(tmp_path, lines, {**SETTINGS, "name": "mine", "pairs": pairs}))
    (table,) = tables.paper_tables(study, study.arms("constant"), printed=True)
    epochs = next(row for row in table.rows if row[0] == "epochs, mean")
    heads = [name for name, _ in table.head]
    controls = [cell for head, cell in zip(heads, epochs, strict=True) if "control" in head]
    assert controls == ["2", "4"]


def test_each_learning_rate_has_its_row_with_what_did_not_complete(study: StudyResults) -> None:
    table = tables.rate_table(study, study.pairs[0], "constant")
    assert table is not None
    first, _, last = table.rows
    assert first[:5] == ["0.01", "0.9200", "0.9400", "0.9400", "0.60"]
    assert first[5:7] == ["+0.0200 (no interval)", "–"]  # the seeds differ by 0.02 each
    assert last[:4] == ["1", "0.1000", "0.9800", "–"]
    assert last[-1] == "3 diverged, 1 failed, 2 missing"


def test_runs_are_counted(study: StudyResults) -> None:
    table = tables.runs_table(study, study.arms("constant"))
    assert table.rows == [
        ["SGD", "6", "3", "0", "0"],
        ["AdaLip", "9", "0", "0", "0"],
        ["control of AdaLip", "6", "0", "1", "2"],
    ]


def test_a_peer_is_compared_at_its_own_best_rate(tmp_path: Path) -> None:
    peers = [
        trial("peer", rate, seed, peak, 1) | {"optimizer": "adamw"}
        for rate, peaks in ((1e-3, (0.95, 0.96, 0.97)), (1e-2, (0.5, 0.5, 0.5)))
        for seed, peak in enumerate(peaks)
    ]
    study = read_study(write(tmp_path, [*trials(), *peers]))
    (found,) = tables.peer_comparisons(study, study.arms("constant"))
    assert (found.what, found.at) == ("AdaLip − AdamW", "best of each, 0.1 and 0.001")
    assert found.found.mean == pytest.approx((0.02 + 0.03 + 0.03) / 3)


def test_a_wrapper_is_shown_over_its_base() -> None:
    assert shown("secant-adam") == "Secant(Adam)"
    assert shown("lip-mine") == "Lipschitz(mine)"


def test_a_run_that_was_run_again_counts_once(tmp_path: Path) -> None:
    lines = trials()
    died = copy.deepcopy(lines[0]) | {"state": "failed", "results": {}, "error": "killed"}
    study = read_study(write(tmp_path, [died, *lines, died]))
    assert len(study.trials) == len(lines)
    assert study.run_again == 2
    assert study.arm("base", study.pairs[0], "constant").values(0.01, study.metric)[0]


def test_other_metrics_and_scripts_without_epochs(tmp_path: Path) -> None:
    lines = trials()
    for line in lines:
        loss = 1.0 - line["results"]["train_accuracy"]
        line["results"] = {"eval_loss": loss, "epoch": 1.0, "train_file": "x/input.txt"}
    study = read_study(
        write(tmp_path, lines, SETTINGS | {"name": "char_lm", "metric": "eval_loss"})
    )
    assert study.measured == "input.txt, 1 epoch, 3 seeds"
    (table,) = tables.paper_tables(study, study.arms("constant"), printed=True)
    assert table.rows[0][0] == "eval loss, min"
    assert len(table.rows) == 4
    assert column(table, "SGD", "")[0] == "0.020"
    drawn = figures.draw(study, "constant", study.arms("constant"))
    missing = [entry.title for entry in drawn if isinstance(entry, figures.Missing)]
    assert len(missing) == 7
    assert "Mean curves over the learning rates (as in Figures 2 to 4 of the paper)" in missing


def test_a_loss_that_diverged_is_as_bad_as_can_be(tmp_path: Path) -> None:
    """At 0.1 one seed of the base is NaN, at 1.0 all are; the median of 1, 2 and ∞ is 2."""
    lines = []
    losses = {("base", 0.1): (1.0, 2.0, None), ("base", 1.0): (None, None, None)}
    losses |= {("form", 0.1): (1.5, 1.5, 1.5), ("form", 1.0): (3.0, 3.0, 3.0)}
    for (role, rate), values in losses.items():
        for seed, loss in enumerate(values):
            line = trial(role, rate, seed, 0.5, 1)
            lines.append(line | {"results": {"eval_loss": loss, "finished": True}})
    study = read_study(write(tmp_path, lines, SETTINGS | {"name": "x", "metric": "eval_loss"}))
    base, form, _ = study.arms("constant")
    assert base.medians(study.metric) == {0.1: 2.0, 1.0: float("inf")}
    (table,) = tables.paper_tables(study, study.arms("constant"), printed=True)
    assert column(table, "SGD", "") == ["2.000", "∞", "∞", "–"]
    assert tables.near_best(base, study.metric) == (0.1, (0.1, 0.1, True, False))
    found = tables.at_best(form, base, study.metric, study.seeds)
    assert found is not None
    assert (found.found.mean, found.pairs) == (0.0, 2)
    assert isinstance(figures.over_rates(study, "constant"), figures.Picture)


def test_the_papers_numbers_are_not_beside_those_of_other_data(tmp_path: Path) -> None:
    lines = trials()
    for line in lines:
        line["results"]["dataset_name"] = "digits"
    study = read_study(write(tmp_path, lines))
    assert study.measured == "digits, 10,000 training examples, 4 epochs, 3 seeds"
    (table,) = tables.paper_tables(study, study.arms("constant"), printed=True)
    assert table.title == "Over the learning rates: peak train accuracy"
    assert not any(name == "paper" for _, name in table.head)


# Pages


class Page(HTMLParser):
    """What a page has that matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[int] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += int(dict(attrs).get("colspan") or 1)
        if tag == "table":
            self.rows.append(-1)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_loads_nothing_and_says_its_pictures_in_words(folder: Path) -> None:
    page = Page()
    page.feed((folder / "report" / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe"} & set(names)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images
    for image in images:
        assert str(image["src"]).startswith("data:image/png;base64,")
        assert len(str(image["alt"])) > 40
    for _, attributes in page.tags:
        values = (attributes.get(name) or "" for name in ("href", "src", "srcset"))
        assert not any(value.startswith(("http", "//", "file")) for value in values)
    assert "url(" not in "".join(page.text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.tags
    )
    for wide in "".join("|" if n == -1 else chr(n) for n in page.rows).split("|")[1:]:
        assert len(set(wide)) == 1, "all rows of a table have as many columns"


def test_every_caption_has_the_scale_and_numbers_have_their_origin(folder: Path) -> None:
    text = (folder / "report" / "report.md").read_text(encoding="utf-8")
    captions = re.findall(r"^\*\*.*\*\*(.*)$", text, re.MULTILINE)
    captions += re.findall(r"^!\[.*\n\n(.*)$", text, re.MULTILINE)
    assert len(captions) >= 8
    for caption in captions:
        assert "MNIST, 10,000 training images, 4 epochs, 3 seeds: not the paper's scale" in caption
        assert "25 of 27 runs are there" in caption
    assert "25 of 27 runs have ended: 21 complete, 3 diverged, 1 failed" in text
    how = text.partition("## How this was measured")[2]
    for part in ("f1f2", "torch 2.14.1", "Seeds: 0, 1, 2", "hf-adalip sweep", "0.01, 0.1, 1"):
        assert part in how
    assert "control sgd, lr 1, seed 0: killed by signal 9" in how
    assert how.count("recipes/mnist.py --optim") == len(("sgd", "adalip"))
    runs = re.findall(r"^ +LEARNING_RATE [0-9.]+: SEED (.*)$", how, re.MULTILINE)
    assert sum(len(seeds.split(", ")) for seeds in runs) == 25
    pictures = re.findall(r"\]\((.*\.png)\)", text)
    assert sorted(pictures) == ["mean_curves.png", "over_learning_rates.png"]
    assert all((folder / "report" / picture).read_bytes()[1:4] == b"PNG" for picture in pictures)
    missing = text.partition("## Figures that are not drawn")[2].partition("##")[0]
    assert (
        "Learning rates per layer (as in Figure 5 of the paper): no run of a form has a" in missing
    )


# Figures


NORMS = [f"{of}_{how}" for of in ("weight", "gradient", "update") for how in ("norm", "mean_abs")]


def recorded(folder: Path, optimizer: str, rate: float, **files: Any) -> None:
    run = folder / "runs" / f"{optimizer}-constant-{rate:g}-0"
    run.mkdir(parents=True)
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))


def test_figures_of_layers_and_of_variants(tmp_path: Path) -> None:
    lines = trials()
    lines += [line | {"schedule": "inverse_sqrt"} for line in trials() if line["role"] == "form"]
    lines += [trial("peer", 0.1, 0, 0.9, 2) | {"optimizer": "adalip", "schedule": "theoretical_c"}]
    names = {"form": "adamlip", "base": "adam"}
    for line in trials():
        if line["role"] in names:
            lines.append(line | {"optimizer": names[line["role"]]})
        if line["role"] == "form":
            lines.append(line | {"optimizer": "adamlipu"})
    pairs = [("sgd", "adalip"), ("adam", "adamlip"), ("adam", "adamlipu")]
    both = ["constant", "inverse_sqrt"]
    settings = SETTINGS | {
        "name": "all",
        "pairs": [
            {"base": b, "form": f, "learning_rates": list(RATES), "schedules": both}
            for b, f in pairs
        ],
    }
    write(tmp_path, lines, settings)
    layers = ["conv1.weight", "bn1.weight", "bn1.bias", "fc1.weight"]
    table = {layer: [0.5 + i, None, 0.4 + i] for i, layer in enumerate(layers)}
    recorded(
        tmp_path,
        "adalip",
        0.1,
        layer_learning_rates={"steps": [1, 2, 3], "scale": table, "lr": table},
    )
    recorded(tmp_path, "sgd", 0.1, records={"steps": [1, 2, 3]} | dict.fromkeys(NORMS, table))
    study = read_study(tmp_path)
    drawn = figures.draw(study, "constant", study.arms("constant"))
    pictures = {entry.name: entry for entry in drawn if isinstance(entry, figures.Picture)}
    assert set(pictures) == {
        *("over_learning_rates", "mean_curves", "layer_learning_rates", "norms"),
        *("norms_batch_norm", "inverse_sqrt", "theoretical_c", "update_signal"),
    }
    assert "bn1" not in pictures["norms"].alt
    assert "conv1" not in pictures["norms_batch_norm"].alt
    assert "AdaLip at 0.1: medians over the steps from 0.45 (conv1.weight)" in (
        pictures["layer_learning_rates"].alt
    )
    with_c = pictures["theoretical_c"].alt
    assert "AdaLip at 0.1, theoretical c_t: 0.450 at epoch 1, 0.900 at epoch 4" in with_c
    recorded(tmp_path, "adam", 0.1, records={"steps": [1, 2]} | dict.fromkeys(NORMS, table))
    damaged = figures.norms(study, "constant", batch_norm=False)
    assert isinstance(damaged, figures.Missing)
    assert damaged.reason == "records.json of adam-constant-0.1-0 cannot be read"


# Bad input


def ends(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: Any) -> str:
    """The one line that the command ends with."""
    monkeypatch.setattr("sys.argv", ["hf-adalip", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("hf-adalip report: error: ")
    assert error.count("\n") == 1
    return error


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: Any) -> str:
        return ends(monkeypatch, capsys, *arguments)

    assert "is not the folder of a study: it has no study.yaml" in said(tmp_path / "none")
    good = write(tmp_path / "good", trials())
    results, settings = good / "results.jsonl", good / "study.yaml"
    assert "takes the report of one study, got 2" in said(good, good, "--output", tmp_path / "x")
    assert "cannot be made" in said(good, "--output", results)
    whole = results.read_text()
    results.write_text(whole.replace('"role": "form"', '"role": "guest"', 1))
    assert "results.jsonl, line 10 is not a trial of a study" in said(good)
    results.write_text("")
    assert "has no run" in said(good)
    results.unlink()
    assert "no run of the study has ended yet" in said(good)
    results.write_text(whole)
    for changed, message in (
        ({"pairs": [{"base": "sgd", "form": "adalip", "learning_rates": []}]}, "no learning_rates"),
        ({"pairs": [{"base": "sgd"}]}, "each takes base, form and learning_rates"),
        ({"name": "own", "metric": "f1"}, "metric 'f1' of"),
    ):
        settings.write_text(yaml.safe_dump(SETTINGS | changed))
        assert message in said(good)
    settings.write_text("[")
    assert "cannot be read as YAML" in said(good)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pairs": 3}, "pairs must be a list, got 3"),
        ({"extras": 3}, "extras must be a list, got 3"),
        ({"rest": 3}, "rest must be a list, got 3"),
        ({"seeds": True}, "seeds must be a list of numbers, got True"),
        ({"seeds": "12"}, "seeds must be a list of numbers, got '12'"),
        ({"control": "false"}, "control must be true or false, without quotes, got 'false'"),
        ({"direction": "up"}, "direction must be maximize or minimize, got 'up'"),
        ({"peers": [{"optimizer": "a", "learning_rates": "12"}]}, "each takes optimizer"),
        (
            {"peers": [{"optimizer": "a", "learning_rates": [1], "schedules": "linear"}]},
            "schedules must be a list, got 'linear'",
        ),
    ],
)
def test_bad_settings_are_one_line(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, trials()[:1], SETTINGS | changed)
    with pytest.raises(UsageError) as error:
        read_study(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [
        *({"seconds": value} for value in ("x", True, float("nan"), 10**400)),
        *({"learning_rate": value} for value in (True, -1, float("nan"), 10**400)),
        {"role": "control", "pair": None},
        {"results": 3},
    ],
)
def test_a_bad_row_is_one_line(changed: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, [trials()[0] | changed])
    with pytest.raises(UsageError, match="line 1 is not a trial of a study"):
        read_study(tmp_path)


@pytest.mark.parametrize("epochs", [3, ["x"], [{"epoch": "x"}], [{"epoch": 10**400}]])
def test_what_a_script_means_by_epochs_may_be_something_else(epochs: Any, tmp_path: Path) -> None:
    line = trials()[0]
    line["results"] |= {"epochs": epochs, "versions": ["1"], "train_samples": 10**400}
    study = read_study(write(tmp_path, [line]))
    assert study.trials[0].curve(study.metric) == []
    assert study.trials[0].value(study.metric) == line["results"]["train_accuracy"]
    assert "not in the results" in str(report._how(study))


def test_lines_are_lines_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    line = trials()[0] | {"error": "one\u2028two"}
    write(tmp_path, [])
    (tmp_path / "results.jsonl").write_text(
        json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8-sig"
    )
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8-sig")
    assert [found.error for found in read_study(tmp_path).trials] == ["one\u2028two"]


@pytest.mark.parametrize("role", ["base", "peer"])
def test_a_peer_that_is_a_base_too_shares_its_runs(role: str, tmp_path: Path) -> None:
    """Whichever of the two the sweep ran them as."""
    lines = [t | {"role": role} if t["role"] == "base" else t for t in trials()]
    peers = [{"optimizer": "sgd", "learning_rates": list(RATES)}]
    study = read_study(write(tmp_path, lines, SETTINGS | {"peers": peers, "control": False}))
    arms = {arm.label: arm for arm in study.arms("constant") if arm.role != "control"}
    assert list(arms) == ["SGD", "AdaLip", "SGD as a peer"]
    assert len(arms["SGD"].trials) == 9
    assert arms["SGD"].trials == arms["SGD as a peer"].trials
    assert study.planned == len(study.trials) == 24  # 6 of them controls


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    write(tmp_path, trials())
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"study": "paper_mn')
    assert len(read_study(tmp_path).trials) == len(trials())


def test_the_command_prints_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "study", trials()[:1])
    monkeypatch.setattr(
        "sys.argv",
        ["hf-adalip", "report", str(tmp_path / "study"), "--output", str(tmp_path / "r")],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "r" / "report.html")
    text = (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    assert "1 of 27 runs have ended" in text
    assert "No form has a run to be compared" in text
