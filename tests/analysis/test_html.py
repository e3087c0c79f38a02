"""The page says the verdict first, with the numbers of the report, and stands alone."""

import html
import math
import re
import shutil
import subprocess

import matplotlib
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.analysis import write_html
from probdefense.checks import Check
from tests.analysis.test_plots import report
from tests.worlds import tiny_batch, tiny_net

matplotlib.use("Agg")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

CHECKS = {
    "plain": [Check("gradient", "ok", "", {"zero gradients": 0.0})],
    "noisy": [
        Check("gradient", "defense masks", "look at <the> gradients", {"zero gradients": 0.75}),
        Check("more draws", "not applicable", "nothing is random"),
    ],
}


def page(folder, **more):
    return write_html(report(), folder, **more).read_text()


def plain_text(page):
    body = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def compared():
    data, nets = (torch.rand(20, 4), torch.randint(3, (20,))), [nn.Linear(4, 3), nn.Linear(4, 3)]
    attacks = {"fgsm": pd.attacks.fgsm}
    a, b = (pd.evaluate(pd.deterministic(n), data, attacks, name=k) for n, k in zip(nets, "ab", strict=True))
    return pd.compare_all(a + b)


def test_the_verdict_comes_first_and_the_strongest_defense_first_of_all(tmp_path):
    text = plain_text(page(tmp_path))
    first, second = text.index("30 % plain is right on"), text.index("20 % noisy is right on")
    assert first < second < text.index("Accuracy In %")
    assert "under pgd at l-inf radius 0.2; 90 % on clean ones." in text


def test_the_table_holds_every_number_with_its_interval(tmp_path):
    text = plain_text(page(tmp_path))
    for row in report().rows:
        low, high = 100 * row["low"], 100 * row["high"]
        assert f"{100 * row['accuracy']:.1f} [{low:.0f}, {high:.0f}]" in text
    assert "defense rule clean fgsm 0.2 pgd 0.2 fgsm 0.1 pgd 0.1" in text
    assert "noisy pgd 16 32 32" in text  # draws per call, gradients and queries per image


def test_checks_that_fired_put_the_verdict_in_doubt(tmp_path):
    text = plain_text(page(tmp_path, checks=CHECKS))
    assert "1 checks found nothing wrong." in text
    assert "Not to be trusted yet: gradient (defense masks)." in text
    assert "noisy gradient defense masks look at <the> gradients (zero gradients 0.75)" in text
    quiet = "2 checks that did not fire: 1 found nothing wrong, 1 does not apply"
    assert text.index("Is it robust, or just noisy?") < text.index(quiet)


def test_only_checks_that_ran_speak_for_a_verdict(tmp_path):
    skips = [Check(name, "not applicable", "nothing is random") for name in ("more draws", "lucky draw")]
    checks = {"plain": [Check("gradient", "ok", ""), Check("flat", "cannot tell", "more"), *skips]}
    text = plain_text(page(tmp_path, checks=checks))
    assert "1 checks found nothing wrong, 1 cannot tell, 2 do not apply. They could show" in text
    assert "3 checks that did not fire: 1 found nothing wrong, 2 do not apply" in text
    ran = {"plain": [Check("gradient", "ok", "")] * 3}
    assert "3 checks that did not fire A check can show" in plain_text(page(tmp_path, checks=ran))


def with_rates(**rates):
    """A report of one defense of which planted attacks leave so much, beside a clean row."""
    rows = [
        {
            "defense": "net",
            "attack": attack,
            "eps": 0.2 * (attack != "clean"),
            "rule": "vote",
            "draws": "none",
        }
        | {"accuracy": rate, "low": rate, "high": rate, "num_examples": 50, "num_samples": 1}
        | {"attack_samples": None, "queries": 0, "gradients": 0}
        for attack, rate in ({"clean": 0.9} | rates | {"worst": min(rates.values())}).items()
    ]
    return pd.Report(rows, {"norm": "inf"})


def test_attacks_that_leave_the_same_are_named_together(tmp_path):
    said = plain_text(write_html(with_rates(fgsm=0.1, pgd=0, suite=0), tmp_path).read_text())
    assert "Strongest attacks: pgd and suite each leave 0 %; then fgsm leaves 10 %." in said
    said = plain_text(write_html(with_rates(fgsm=0.1, pgd=0.02, suite=0.1), tmp_path).read_text())
    assert "Strongest attack: pgd leaves 2 %; then fgsm and suite each leave 10 %." in said
    said = plain_text(write_html(with_rates(fgsm=0, pgd=0.001), tmp_path).read_text())
    assert "Strongest attacks: fgsm and pgd each leave 0 %. " in said


def test_a_line_is_gray_where_the_pair_is_not_told_apart(tmp_path):
    """Not where its own interval leaves out 0, but where p does among all pairs, as in the terminal."""
    row = {"attack": "clean", "eps": 0.0, "rule": "vote", "difference": 0.07, "low": 0.01, "high": 0.13}
    row |= {"accuracy_a": 0.9, "accuracy_b": 0.83, "probability": 0.99, "num_examples": 9}
    found = [row | {"a": "plain", "b": "noisy", "p_holm": p} for p in (0.04, 0.2)]
    text = page(tmp_path, comparison=pd.Comparison(found, 1))
    assert (text.count('class="line"'), text.count('class="line unclear"')) == (1, 1)


def test_settings_say_what_was_asked_and_what_was_used_and_nothing_twice(tmp_path):
    asked = {"norm": "inf", "images": 1000, "num_examples": 360, "draw_chunk": None, "torch": "2.9"}
    whole = pd.Report(with_rates(pgd=0.1).rows, asked | {"versions": {"torch": "2.9"}})
    text = plain_text(write_html(whole, tmp_path).read_text()).partition("Settings and versions")[2]
    assert "test images asked for 1000 test images used 360" in text
    assert text.count("torch") == 1 and "draw_chunk" not in text
    whole.settings["images"] = 360
    assert "asked for" not in plain_text(write_html(whole, tmp_path).read_text())


def test_a_tie_is_said_and_has_no_sign(tmp_path):
    data, net = (torch.rand(20, 4), torch.randint(3, (20,))), nn.Linear(4, 3)
    same = sum(pd.evaluate(pd.deterministic(net), data, name=name) for name in "ab")
    text = plain_text(same.to_html(tmp_path).read_text())
    assert "a - b clean mean_prob tie [-" in text and "+0.0" not in text


def test_pairs_certificates_and_pictures_are_shown_when_given(tmp_path):
    comparison, (x, x_adv) = compared(), torch.rand(2, 3, 1, 4, 4)
    certificate = {"noisy": [{"eps": 0.25, "accuracy": 0.5, "low": 0.3, "high": 0.7}]}
    more = {"comparison": comparison, "certificate": certificate, "images": {"digits": (x, x_adv)}}
    whole = page(tmp_path, **more)
    text = plain_text(whole)
    assert "Pairs Percentage points; one training seed" in text
    assert f"{100 * comparison.rows[0]['difference']:+.1f}" in text and "a - b clean" in text
    assert "Certified accuracy" in text and "noisy 50.0 [30, 70]" in text
    assert whole.count("<svg") == 3 and "digits" in text
    bare = plain_text(page(tmp_path))
    assert "Pairs" not in bare and "Certified" not in bare and "noisy?" not in bare


def test_the_page_stands_alone_and_depends_on_its_input_alone(tmp_path):
    one, two = page(tmp_path / "a", checks=CHECKS), page(tmp_path / "b", checks=CHECKS)
    assert one == two
    assert not re.search(r'(src|href)="(?!data:|#)', one) and "@import" not in one
    ids = re.findall(r'\sid="([^"]+)"', one)
    assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]+)\)", one)) <= set(ids)
    assert "prefers-color-scheme: dark" in one and "#0072b2" not in re.sub(r"--c\d: #\w+", "", one).lower()


def test_names_are_escaped_and_other_files_stay(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    strange = report()
    strange.rows = [
        row | {"defense": "<script>"} if row["defense"] == "noisy" else row for row in strange.rows
    ]
    text = write_html(strange, tmp_path).read_text()
    assert "<script>" not in text and (tmp_path / "mine.txt").read_text() == "mine"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["mine.txt", "report.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("screen", [390, 1280])
def test_a_phone_shows_it_without_scrolling_sideways(screen, tmp_path):
    text = page(tmp_path, checks=CHECKS, comparison=compared(), images={"noisy under pgd": labeled()})
    frame = f'<iframe width="{screen}" height="800" srcdoc="{html.escape(text)}"></iframe>'
    read = "document.title = document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    (tmp_path / "phone.html").write_text(f"{frame}<script>onload = () => {{ {read} }}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    run = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", f"file://{tmp_path}/phone.html"], capture_output=True, timeout=120
    )
    width = int(re.search(r"<title>(\d+)</title>", run.stdout.decode()).group(1))
    assert 0 < width <= screen


def labeled(count=6):
    """Images, what an attack made of them, and planted answers: 0 for all of class 0, then 1 for the first two."""
    x = torch.rand(count, 1, 4, 4) * 0.5 + 0.25
    x_adv, y = x.clone(), torch.zeros(count).long()
    x_adv[-2:, 0, 0, 0] += 0.25
    answers = torch.zeros(2, count).long()
    answers[1, -2:] = 1
    before, after = (
        pd.Prediction(torch.eye(3)[each].mul(5).log_softmax(-1), torch.zeros(count), 1) for each in answers
    )
    return x, x_adv, y, before, after


def test_images_show_answers_before_and_after_with_failures_first(tmp_path):
    text = page(tmp_path, images={"noisy under pgd": labeled()})
    seen = plain_text(text)
    assert "4 of 6 are right under attack, failures first" in seen and "full color is 0.25 in pixels" in seen
    assert seen.count("0 → 1 becomes wrong") == 2 and seen.count("0 → 0 stays right") == 4
    assert seen.index("becomes wrong") < seen.index("stays right") and "99 % → 99 %" in seen
    images = re.findall(r"<img [^>]*>", text)
    assert len(images) == 18 and all(re.search(r'alt="[^"]+"', each) for each in images)
    assert text.count('role="img" aria-label="') == text.count("<svg")


def test_a_report_takes_the_objects_as_they_are(tmp_path):
    defense = pd.defenses.rse(tiny_net())
    x, y = tiny_batch(12)
    one = pd.evaluate(defense, (x, y), {"fgsm": pd.attacks.fgsm}, eps=0.2, num_samples=4, seed=0)
    checks = pd.checks.run(defense, x, y, eps=0.2, num_gradients=10, num_samples=2, num_verdict=2)
    certificate = pd.certify(defense, x[:5], n0=10, n=50, seed=0)
    x_adv = pd.attacks.fgsm(defense, x, y, eps=0.2, seed=0)
    images = (x, x_adv, y, pd.predict(defense, x, 4, seed=0), pd.predict(defense, x_adv, 4, seed=0))
    path = one.to_html(
        tmp_path / "deep" / "mine.html", checks=checks, certificates=certificate, images=images
    )
    assert path == tmp_path / "deep" / "mine.html"
    text = plain_text(path.read_text())
    row = certificate.curve(y[:5], [0.0])[0]
    assert "Certified accuracy" in text and f"defense {100 * row['accuracy']:.1f} [" in text
    assert (
        "an L2 length of up to 1.2: a certificate at L2 0.2 says nothing about them" in text
    )  # 0.2 * sqrt(36)
    assert one.to_html(tmp_path).name == "report.html"


def test_the_norm_of_a_certificate_is_its_own(tmp_path):
    defense, (x, y) = pd.defenses.rse(tiny_net()), tiny_batch(6)
    one = pd.evaluate(defense, (x, y), {"fgsm": pd.attacks.fgsm}, eps=0.2, num_samples=4, seed=0)
    certificate = pd.certify(defense, x, n0=10, n=50, seed=0, norm=math.inf)
    text = plain_text(one.to_html(tmp_path, certificates=certificate).read_text())
    assert "Radii are l-inf, those of the attacks l-inf." in text and "L2" not in text


def test_a_report_of_several_compares_them_and_wants_results_by_name(tmp_path):
    data, nets = (torch.rand(20, 4), torch.randint(3, (20,))), [nn.Linear(4, 3), nn.Linear(4, 3)]
    attacks = {"fgsm": pd.attacks.fgsm}
    both = sum(
        pd.evaluate(pd.deterministic(n), data, attacks, name=k) for n, k in zip(nets, "ab", strict=True)
    )
    text = both.to_html(tmp_path).read_text()
    assert 'class="track"' in text and plain_text(text).count("Pairs") == 1
    checks = pd.checks.Checks((Check("gradient", "ok", ""),))
    with pytest.raises(ValueError, match="expected checks by defense, got one for 2 defenses"):
        both.to_html(tmp_path, checks=checks)
    for wrong, match in ((data, "images"), ((1, 2, 3), "got 3 things")):
        with pytest.raises((ValueError, TypeError), match=match):
            both.to_html(tmp_path, images=wrong)


def test_pairs_under_attack_are_shown_where_there_is_no_worst_case(tmp_path):
    """One attack is the worst case itself, and has no row of that name."""
    comparison = compared()
    assert {row["attack"] for row in comparison.rows} == {"clean", "fgsm"}
    text = plain_text(page(tmp_path, comparison=comparison))
    assert "fgsm 0.2 mean_prob" in text and "clean mean_prob" in text
    two = plain_text(page(tmp_path, comparison=pd.compare_all(report())))
    assert "plain - noisy fgsm 0.2 vote" in two and "plain - noisy pgd 0.2 vote" in two
    assert "fgsm 0.1 vote" not in two


def test_what_does_not_belong_to_the_report_is_refused(tmp_path):
    one = pd.evaluate(pd.deterministic(tiny_net()), tiny_batch(6), {"fgsm": pd.attacks.fgsm}, name="net")
    x, _ = tiny_batch(6)
    found = pd.predict(pd.deterministic(tiny_net()), x)
    labels = found.label
    for wrong, match in (
        ({"images": (x, x[:5])}, r"expected x_adv of shape \(6, "),
        ({"images": {"net": (x, x[:5], labels, found, found)}}, r"expected x_adv of shape \(6, "),
        ({"checks": {"net": "ok"}}, "expected checks of 'net' as Check"),
        ({"checks": {"net": 3}}, "expected checks of 'net' as Check"),
        ({"checks": {"nett": pd.checks.Checks(())}}, "unknown defense 'nett'; .*net"),
        ({"certificates": {"net": "x"}}, "expected certificate of 'net' as"),
        ({"certificates": {"net": None}}, "expected certificate of 'net' as"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            one.to_html(tmp_path, **wrong)
    with pytest.raises(TypeError, match="give a folder, or a file that ends in .html"):
        one.to_html(3)
    with pytest.raises(OSError, match="Report.save and probdefense evaluate write them"):
        pd.Report.load(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_pairs_stand_in_the_order_of_the_page(tmp_path):
    """The more robust one first, seen from its side, whatever the order of the comparison."""
    both = report()
    both.rows = both.rows[len(both.rows) // 2 :] + both.rows[: len(both.rows) // 2]
    comparison = pd.compare_all(both)
    row = next(row for row in comparison.rows if row["attack"] == "clean")
    assert (row["a"], row["b"]) == ("noisy", "plain") and row["difference"] < 0
    text = plain_text(write_html(both, tmp_path, comparison=comparison).read_text())
    low, high = -100 * row["high"], -100 * row["low"]
    shown = f"plain - noisy clean {row['rule']} {-100 * row['difference']:+.1f} [{low:.1f}, {high:.1f}]"
    assert shown in text and "noisy - plain" not in text
    better = re.search(re.escape(shown) + r" (\S+)", text)[1]
    assert float(better) == pytest.approx(1 - row["probability"], abs=5e-4)


def test_a_network_without_randomness_has_one_line(tmp_path):
    one = pd.evaluate(
        pd.deterministic(nn.Linear(4, 3)), (torch.rand(9, 4), torch.zeros(9).long()), name="net"
    )
    assert {row["rule"] for row in one.rows} == {"mean_prob", "single_draw"}
    assert plain_text(one.to_html(tmp_path).read_text()).count("net mean_prob") == 1
    assert "net single_draw" not in plain_text(one.to_html(tmp_path).read_text())


def luminance(color):
    """Relative luminance, WCAG 2.1."""
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_can_be_read_on_its_ground_in_light_and_dark(tmp_path):
    """At least 4.5 for text and 3 for marks, as WCAG 2.1 has it."""
    themes = re.findall(r":root \{(.*?)\}", page(tmp_path), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-fA-F]{6})", theme))
        for ground in ("paper", "card"):
            back = luminance(colors[ground])
            for name, least in (("ink", 4.5), ("muted", 4.5), ("bad", 4.5), ("c0", 3.0)):
                low, high = sorted((back, luminance(colors[name])))
                assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


@pytest.mark.parametrize(
    "wrong", [{"checks": 3}, {"certificates": "all"}, {"images": 3}, {"figures": {"a": 3}}, {"comparison": 3}]
)
def test_what_a_page_cannot_show_is_refused(wrong, tmp_path):
    with pytest.raises(TypeError, match=r"^expected"):
        report().to_html(tmp_path / "page.html", **wrong)
