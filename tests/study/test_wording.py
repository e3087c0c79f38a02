"""What the command prints fits 80 columns, says a number once, and keeps the long lists for those who ask."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import probdefense as pd
from probdefense.analysis.sections import accuracies
from probdefense.checks import Check
from probdefense.checks.results import Checks
from probdefense.evaluation.report import Report, proportion
from probdefense.study.job import Result
from probdefense.study.wording import _best, _pair, _ranges, judged, lines

NAMES = ("none", "adv_bnn", "rse", "madry")
ATTACKS = {"clean": 0.0, "eot_pgd": 0.2, "fgsm": 0.2, "square": 0.2, "suite": 0.2, "worst": 0.2}


def planted(names=NAMES, attacks=tuple(ATTACKS), examples=100):
    """Two rules; `none` and `madry` are deterministic, so both rules say the same."""
    rows, arrays = [], {}
    for d, name in enumerate(names):
        draws = "none" if name in ("none", "madry") else "independent"
        arrays[f"labels/{name}"], arrays[f"ids/{name}"] = np.zeros(examples, int), np.arange(examples)
        for a, attack in enumerate(attacks):
            for r, rule in enumerate(("mean_prob", "single_draw")):
                right = 95 - 12 * a + 4 * d - (r if draws != "none" else 0)
                correct = (np.arange(examples) < right)[None]
                arrays[f"correct/{name}/{attack}/{ATTACKS[attack]:g}/{rule}"] = correct
                spent = (None, 0) if attack in ("clean", "worst") else (4, 6400)
                rows.append(
                    {"defense": name, "attack": attack, "eps": ATTACKS[attack], "rule": rule}
                    | proportion(correct)
                    | {"num_examples": examples, "num_samples": 20, "draws": draws}
                    | {"attack_samples": spent[0], "queries": spent[1], "gradients": spent[1]}
                )
    asked = {"eps": 0.2, "epochs": 3, "gradients": 64, "suite_budget": 1000, "num_samples": 20}
    settings = {**asked, "norm": "inf", "checked": 50, "check_gradients": 16, "estimand": "population"}
    return Report(rows, settings, arrays)


def result(names=NAMES, certified=True, **options):
    report = planted(names, **options)
    doubt = Check("gradient", "defense masks", "attack without gradients " * 8)
    checks = {name: Checks((Check("logits", "ok", ""), doubt)) for name in names}
    certificate = pd.Certificate(
        torch.zeros(8).long(), torch.full((8,), 0.3), torch.ones(8), torch.ones(8).long(), 0.1, 0.001
    )
    comparison = pd.compare_all(report, rule="mean_prob") if len(names) > 1 else None
    test = torch.rand(100, 4), torch.zeros(100).long()
    certificates = {"rse": certificate} if certified else {}
    return Result(report, {}, test, comparison, checks, certificates, {})


GOLDEN = """\
accuracy in % and its 95 % interval; l-inf radius 0.2, 100 images

defense  rule         clean           worst          eot_pgd
------------------------------------------------------------
rse      mean_prob    99.0 [95, 100]  75.0 [66, 82]  87.0 [79, 92]
rse      single_draw  98.0 [93, 99]   74.0 [65, 82]  86.0 [78, 91]
none     mean_prob    95.0 [89, 98]   71.0 [61, 79]  83.0 [74, 89]

budget: 3 epochs, 64 gradients per image and attack,
  at most 1000 evaluations for the suite: so that it ends in minutes
spent per image: eot_pgd 64 gradients (4 draws per call)

checks at 50 images, 16 gradients per image, which is little; checks.run takes
  more
checks, rse: 1 ok, 1 fired: gradient (defense masks)
checks, none: 1 ok, 1 fired: gradient (defense masks)

pairs under worst, in points; one training seed: about these networks, not these
  methods (training anew moves robust accuracy by points); give one report per
  seed
  no winner: rse is not told apart from none (+4.0)

report.html has every pair and check; --verbose prints them here"""


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(width, verbose):
    said = lines(result(), width, verbose)
    assert max(map(len, said)) <= width
    whole = " ".join(" ".join(said).split())
    for row in planted().rows:
        interval = f"{100 * row['accuracy']:.1f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
        assert interval in whole
    assert all(line.count("[") == line.count("]") for line in said)  # no interval is broken


def test_the_whole_text_at_eighty_columns():
    found = lines(result(("none", "rse"), attacks=("clean", "eot_pgd", "worst"), certified=False), 80)
    assert "\n".join(found) == GOLDEN


def test_a_network_without_randomness_has_one_line_and_empty_columns_are_left_out():
    table = [line.split()[:2] for line in lines(result(certified=False)) if line.startswith(NAMES)]
    assert table.count(["none", "mean_prob"]) == table.count(["madry", "mean_prob"]) >= 1
    assert ["none", "single_draw"] not in table and ["rse", "single_draw"] in table
    assert not any("certified" in line for line in lines(result(certified=False)))
    assert any("certified, L2 0.2" in line for line in lines(result()))


def test_long_lists_are_for_those_who_ask():
    short, whole = lines(result()), lines(result(), verbose=True)
    assert "report.html has every pair and check" in short[-1] and "--verbose" in short[-1]
    assert sum("P(" in line for line in whole) == 6 and not any("P(" in line for line in short)
    said = " ".join(" ".join(short).split())
    assert "madry is above none (+12.0); not told apart from rse (+4.0), adv_bnn (+8.0)" in said
    assert sum("attack without gradients" in line for line in whole) >= 4 * 1
    assert not any("attack without gradients" in line for line in short)
    below = [found[next(k for k, line in enumerate(found) if "budget" in line) :] for found in (short, whole)]
    assert len(below[0]) < 22 < len(below[1])


def test_a_certificate_that_no_image_could_get_is_no_zero_of_the_defense():
    few = pd.Certificate(
        torch.zeros(8).long(), torch.zeros(8), torch.ones(8), torch.full((8,), 20), 0.1, 0.001
    )
    said = " ".join(" ".join(lines(replace(result(), certificates={"rse": few}))).split())
    assert "20 draws that all agree certify radius 0.0547 at most, so no image could pass 0.2, which" in said
    assert "agree" not in " ".join(lines(result()))


def test_one_gradient_is_no_gradients():
    assert _ranges("fgsm", [("gradients", 1.0, 1), ("queries", 1.0, 4), ("queries", 2.0, 4)]) == (
        "1 gradient (1 draw per call), 1 to 2 queries (4 draws per call)"
    )


def test_several_radii_have_columns_of_their_own_and_the_norm_is_named():
    found = result(("none", "rse"), attacks=("clean", "fgsm"))
    extra = [row | {"eps": 0.1} for row in found.report.rows if row["attack"] == "fgsm"]
    report = Report(found.report.rows + extra, {**found.report.settings, "norm": "2"}, found.report.arrays)
    said = judged(report, None, None)
    assert said[0] == "accuracy in % and its 95 % interval; L2 radii 0.1 and 0.2, 100 images"
    assert said[2].split() == ["defense", "rule", "clean", "fgsm", "0.2", "fgsm", "0.1"]
    assert "another ball" not in " ".join(lines(replace(found, report=report)))
    assert "L2 is another ball than the one attacked" in " ".join(" ".join(lines(found)).split())


def test_worst_cases_of_other_attacks_are_not_compared_in_silence():
    whole, part = planted(("rse",)), planted(("none",), attacks=("clean", "eot_pgd", "worst"))
    both = whole + part
    said = " ".join(" ".join(judged(both, pd.compare_all(both, rule="mean_prob"), None)).split())
    assert "not of the same attacks (rse eot_pgd, fgsm, square and suite; none eot_pgd)" in said
    assert "not of the same attacks" not in " ".join(lines(result()))


def test_a_worst_case_above_an_attack_is_explained():
    found = planted(("rse",), attacks=("clean", "eot_pgd", "worst"))
    assert "by chance" not in " ".join(judged(found, None, None))
    found.rows = [row | {"accuracy": 0.9} if row["attack"] == "worst" else row for row in found.rows]
    said = " ".join(" ".join(judged(found, None, None)).split())
    assert "the worst case may lie above a single attack by chance" in said
    assert "The worst case may lie above a single attack by chance" in accuracies(found).caption


def test_what_is_of_one_training_of_several_says_so():
    found = result()
    assert "training seed at" not in " ".join(lines(found))
    rows = [row | {"num_seeds": 3, "seed_spread": 0.01} for row in found.report.rows]
    said = " ".join(" ".join(lines(replace(found, report=replace(found.report, rows=rows)))).split())
    assert "checks of the first training seed at 50 images" in said
    assert "another ball than the one attacked; of the first training seed" in said


def pairs(**accuracies):
    """What is said of pairs under one attack, whose planted rates differ on examples of 1000."""
    reports = []
    for name, right in accuracies.items():
        correct = (np.arange(1000) < right)[None]
        row = {"defense": name, "attack": "worst", "eps": 0.2, "rule": "mean_prob", "draws": "none"}
        arrays = {f"correct/{name}/worst/0.2/mean_prob": correct, f"ids/{name}": np.arange(1000)}
        reports.append(Report([row | proportion(correct)], {}, arrays | {f"labels/{name}": np.zeros(1000)}))
    return _best(pd.compare_all(sum(reports)).rows)


def test_a_tie_is_said_as_a_tie_and_what_is_not_told_apart_has_no_winner():
    assert pairs(none=0, rse=0) == ["  no winner: none and rse tie at 0.0"]
    assert pairs(none=501, rse=504) == ["  no winner: rse is not told apart from none (+0.3)"]
    assert pairs(none=504, rse=504, pni=503) == [
        "  no winner: none and rse tie at 50.4; not told apart from pni (+0.1)"
    ]
    assert pairs(none=100, rse=600, pni=600) == ["  rse and pni tie at 60.0 and are above none (+50.0)"]
    assert pairs(none=100, rse=601, pni=600) == [
        "  rse is above none (+50.1); not told apart from pni (+0.1)"
    ]


def test_every_pair_says_a_tie_and_small_probabilities_as_what_they_are():
    found = lines(result(("none", "rse", "pni"), certified=False), verbose=True)
    assert any(line.startswith("  pni - rse: +4.0 [") and "P(pni is better) = 0." in line for line in found)
    row = {"a": "x", "b": "y", "difference": -0.0001, "low": -0.02, "high": 0.01}
    assert _pair(row | {"probability": 1e-9, "p_holm": 1.0}) == (
        "  x - y: tie [-2.0, 1.0], P(x is better) < 0.001, p > 0.999 (Holm)"
    )


def test_checks_that_do_not_apply_are_no_checks_that_ran():
    found = result(("none",), certified=False)
    skips = [Check(name, "not applicable", "nothing is random") for name in ("more draws", "lucky draw")]
    found.checks["none"] = Checks((Check("logits", "ok", ""), Check("flat", "cannot tell", "more"), *skips))
    said = lines(found, 120)
    assert "checks, none: 1 ok, 0 fired, 1 cannot tell, 2 do not apply: flat (cannot tell)" in said


def test_one_draw_is_no_draws():
    costs = [("gradients", 32.0, 1), ("gradients", 32.0, 16), ("gradients", 40.0, 16)]
    said = _ranges("eot_pgd", costs)
    assert said == "32 gradients (1 draw per call), 32 to 40 gradients (16 draws per call)"
