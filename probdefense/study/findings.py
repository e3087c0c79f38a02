"""What a folder holds of a judgement: the report, the certificate, and the pictures and page made of both."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from probdefense.checks import Checks
from probdefense.evaluation.arrays import Arrays
from probdefense.evaluation.certification import Certificate
from probdefense.evaluation.comparison import Comparison, compare_all, is_same
from probdefense.evaluation.report import Report, Row, proportion
from probdefense.files import together, whole
from probdefense.study import store
from probdefense.study.pool import steady
from probdefense.types import Labels

REPORT, CERTIFICATE = "report.json", "certificate.json"

STEPS = (0.0, 0.5, 1.0, 1.5, 2.0)
"""Radii of the table of a certificate, in scales of the noise."""


def write_report(report: Report, folder: Path) -> list[str]:
    """Writes the report, the pictures and the page, all or nothing, and names the files.

    Raises:
        OSError: the folder cannot be written.
    """
    with together(folder) as place:
        report.save(place)
        _draw(Drawn(report, _certificates([folder]), None), place)
        return sorted(path.name for path in place.iterdir())


def write_certificate(
    name: str, found: Certificate, y: Labels, asked: dict[str, Any], folder: Path
) -> list[str]:
    """Writes the certificate, and the page anew where there is a report, and names the files.

    Raises:
        ValueError: the report of the folder is damaged.
        OSError: the folder cannot be written.
    """
    rows = found.curve(y, [step * found.sigma for step in STEPS])
    kept = {name: getattr(found, name).tolist() for name in ("label", "radius", "share", "num_votes")}
    about = {"defense": name, "sigma": found.sigma, "alpha": found.alpha, **asked}
    text = json.dumps({**about, "rows": rows, "labels": y.tolist(), **kept}) + "\n"
    with whole(folder / CERTIFICATE) as place:
        place.write_text(text)
    return [CERTIFICATE, *(write_drawn(redrawn([folder]), folder) if (folder / REPORT).exists() else ())]


class Drawn(NamedTuple):
    """What a page is made of: a report, certificates and checks by defense, and pairs."""

    report: Report
    certificates: dict[str, list[Row]]
    comparison: Comparison | None
    checks: dict[str, Checks] | None = None


def redrawn(folders: Sequence[Path]) -> Drawn:
    """What was saved in one folder or several.

    Several folders of the same defenses are seeds of their training, joined as replicates; other defenses
    stand beside each other, and every pair is compared.

    Raises:
        ValueError: damaged files, or reports that do not belong together.
        OSError: files that are not there.
    """
    each = [place for folder in folders for place in sorted(folder.glob("seed-*/")) or [folder]]
    several = replicates([Report.load(folder) for folder in each])
    checks, certificates = _judged(each, several[0])
    return Drawn(joined(several), certificates | _certificates(each), compared(several), checks)


def write_drawn(drawn: Drawn, folder: Path) -> list[str]:
    """Writes the pictures and the page, both or none, and names them.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with together(folder) as place:
        _draw(drawn, place)
        return sorted(path.name for path in place.iterdir())


def replicates(reports: Sequence[Report]) -> list[Report]:
    """One report of all defenses per seed of their training.

    Raises:
        ValueError: not every defense has as many reports, one is there twice, or settings differ.
    """
    of: dict[str, list[Report]] = {}
    for report in reports:
        for name in report.defenses:
            of.setdefault(name, []).append(_another(report.only(name), of.get(name, ())))
    counts = {name: len(found) for name, found in of.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} in {count}" for name, count in counts.items())
        raise ValueError(
            f"expected every defense in as many folders, one per seed of its training, got {told}; give the "
            "folders that are missing"
        )
    return [sum(rest, first) for first, *rest in zip(*of.values(), strict=True)]


def _another(report: Report, before: Sequence[Report]) -> Report:
    """A report that is not among those before: what is counted twice narrows every interval.

    Raises:
        ValueError: it is.
    """
    for other in before:
        if is_same(report, other):
            raise ValueError(
                f"expected one folder per seed of the training of {report.defenses[0]}, got the same report "
                "twice; give each folder once"
            )
    return report


def joined(several: Sequence[Report]) -> Report:
    """The report of all seeds: accuracies are means, intervals speak of other seeds and other images.

    Every row has the standard deviation of its accuracy between seeds as ``seed_spread``.
    """
    first = several[0]
    if len(several) == 1:
        return first
    settings = {name: _common([each.settings.get(name) for each in several]) for name in first.settings}
    arrays, rows = Arrays(), []
    for row in first.rows:
        place = {name: row[name] for name in ("defense", "attack", "eps", "rule")}
        correct = [each.arrays.at("correct", *place.values()).mean(0) for each in several]
        if len({len(table) for table in correct}) > 1:
            raise ValueError(
                "expected reports on the same examples, got other numbers of them; evaluate anew"
            )
        arrays.put(np.stack(correct), "correct", *place.values())
        spent = {
            n: sum(each.row(**place)[n] for each in several) // len(several) for n in ("queries", "gradients")
        }
        judged = proportion(np.stack(correct), "shared", settings.get("estimand", "population"))
        spread = float(np.std([table.mean() for table in correct], ddof=1))
        rows.append({**row, **judged, **spent, "num_seeds": len(several), "seed_spread": spread})
    return Report(rows, settings | {"training seeds": len(several)}, arrays)


def _common(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def compared(several: Sequence[Report]) -> Comparison | None:
    """Every pair of defenses that saw the same images, adjusted among those; None without pairs."""
    first, rows = several[0], []
    seen = {name: len(first.arrays.at("labels", name)) for name in first.defenses}
    for count in dict.fromkeys(seen.values()):
        names = [name for name in first.defenses if seen[name] == count]
        if len(names) > 1:
            kept = [[report.only(name) for name in names] for report in several]
            same = [sum(each[1:], each[0]) for each in kept]
            rows += compare_all(same, rule=first.rows[0]["rule"]).rows
    return Comparison(rows, len(several)) if rows else None


def _judged(folders: Sequence[Path], report: Report) -> tuple[dict[str, Checks], dict[str, list[Row]]]:
    """The checks and the tables of certificates that ``compare`` keeps; of several seeds the first.

    Raises:
        ValueError: one of them is damaged.
    """
    checks, certificates = {}, {}
    kept = {name: found for folder in reversed(folders) for name, found in store.judged(folder).items()}
    for name in report.defenses:
        checked, certificate = kept.get(name, (None, None))
        if checked is not None:
            checks[name] = checked
        if certificate is not None:
            y = torch.as_tensor(report.arrays.at("labels", name))[: len(certificate.label)]
            certificates[name] = certificate.curve(y, [step * certificate.sigma for step in STEPS])
    return checks, certificates


def _certificates(folders: Sequence[Path]) -> dict[str, list[Row]]:
    """The tables of the certificates that lie in folders, by defense.

    Raises:
        ValueError: one of them is damaged.
    """
    found = {}
    for path in (folder / CERTIFICATE for folder in folders):
        if path.exists():
            try:
                content = json.loads(path.read_text())
                found[str(content["defense"])] = list(content["rows"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"expected a certificate in {path}, got something else; certify again"
                ) from error
    return found


def _draw(drawn: Drawn, place: Path) -> None:
    from matplotlib import pyplot

    from probdefense import analysis
    from probdefense.analysis.sections import ranked

    with steady():
        figure = analysis.accuracy_chart(ranked(drawn.report)).figure
        figure.savefig(place / "robustness.png", format="png", dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        analysis.write_html(
            drawn.report,
            place,
            checks=drawn.checks,
            certificate=drawn.certificates,
            comparison=drawn.comparison,
        )
