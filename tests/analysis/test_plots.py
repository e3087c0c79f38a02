"""Pictures show the numbers they are given, leave given axes' figure alone, and cut no text."""

import re
import warnings
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_hex
from torch import nn

import probdefense as pd
from probdefense import analysis
from probdefense.analysis.curves import RobustnessCurve
from probdefense.analysis.drawings import inline_svg
from probdefense.analysis.style import COLORS, label_ends
from probdefense.evaluation.certification import Certificate
from probdefense.evaluation.report import Report, proportion
from tests.worlds import tiny_batch, tiny_net

matplotlib.use("Agg")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def report(norm="inf", draws=(None, 1, 16)):
    """Two defenses, clean and under two attacks at two radii, with planted accuracies of 20 examples."""
    rows, arrays = [], {"labels/plain": np.zeros(20, np.int64), "labels/noisy": np.zeros(20, np.int64)}
    for d, name in enumerate(("plain", "noisy")):
        for attack, samples in zip(("clean", "fgsm", "pgd"), draws, strict=True):
            for eps in (0.0,) if attack == "clean" else (0.1, 0.2):
                right = 18 - round(40 * eps) * (attack == "pgd") - round(20 * eps) - 2 * d
                correct = (np.arange(20) < right)[None]
                arrays[f"correct/{name}/{attack}/{eps:g}/vote"] = correct
                about = {"defense": name, "attack": attack, "eps": eps, "rule": "vote", "num_examples": 20}
                spent = {"attack_samples": samples, "gradients": 640, "queries": 640, "draws": "none"}
                rows.append(about | proportion(correct) | spent)
    return Report(rows, {"norm": norm, "num_samples": 10, "estimand": "population"}, arrays)


def texts(ax):
    drawn = [text.get_text() for text in ax.texts]
    return [*drawn, *(label.get_text() for label in ax.get_yticklabels()), ax.get_title(loc="left")]


def dots(ax):
    return [line.get_xydata() for line in ax.lines if line.get_marker() == "o"]


def nothing_is_cut(ax):
    """Whether everything that is written lies within the figure."""
    figure = ax.figure
    figure.canvas.draw()
    page = figure.bbox.padded(1)
    ticks = [t.label1 for axis in (ax.xaxis, ax.yaxis) for t in axis._update_ticks()]
    written = [*ax.texts, *ticks, ax.xaxis.label, ax._left_title]
    boxes = [text.get_window_extent() for text in written if text.get_text()]
    return all(page.x0 <= b.x0 and b.x1 <= page.x1 and page.y0 <= b.y0 and b.y1 <= page.y1 for b in boxes)


def test_the_chart_has_the_order_of_the_tables():
    found = report()
    found.rows += [row | {"attack": "worst"} for row in found.rows if row["attack"] == "pgd"]
    named = [label.get_text() for label in analysis.accuracy_chart(found).get_yticklabels()]
    assert named == ["clean", "worst", "fgsm", "pgd"] * 2


def test_the_chart_has_one_dot_per_row_at_the_largest_radius():
    ax = analysis.accuracy_chart(report())
    assert [float(xy[0, 0]) for xy in dots(ax)] == pytest.approx([0.9, 0.7, 0.3, 0.8, 0.6, 0.2])
    assert {"plain", "noisy", "clean", "fgsm", "pgd", "Accuracy"} <= set(texts(ax))
    assert any("30 " in text for text in texts(ax)) and nothing_is_cut(ax)
    smaller = analysis.accuracy_chart(report(), eps=0.1)
    assert float(dots(smaller)[2][0, 0]) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "name", ["defense number 12", "x" * 60, r"$\frac{$", "$$", "\N{CJK UNIFIED IDEOGRAPH-6A21}"]
)
def test_any_name_fits_and_is_written_as_it_is(name):
    """Long names cut nothing, dollar signs are no formula, and the reader's browser has the letters."""
    found = report()
    for row in found.rows:
        row["defense"] = {"plain": name}.get(row["defense"], row["defense"])
        row["attack"] = {"pgd": name}.get(row["attack"], row["attack"])
    ax = analysis.accuracy_chart(found)
    svg = inline_svg(ax.figure, "a")
    assert {name if len(name) < 40 else f"{name[:31]}\N{HORIZONTAL ELLIPSIS}"} < set(texts(ax))
    assert name[:20] in svg
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font here does not have
        tight = ax.figure.get_tightbbox()
    assert 72 * tight.width <= width
    share = ax.get_position().width
    assert share > 1 / 3, "nothing is left for the dots"


def test_a_legend_writes_names_as_they_are():
    attacks = {"square": pd.attacks.square}
    found = pd.evaluate(pd.deterministic(tiny_net()), tiny_batch(6), attacks, max_queries=[5, 20], name="$$")
    assert "$$" in inline_svg(analysis.accuracy_against_queries(found, "square").figure, "a")


def test_curves_of_a_report_pass_through_its_rows():
    ax = analysis.robustness_curves(report())
    plain, noisy = dots(ax)
    assert plain == pytest.approx(np.array([[0, 0.9], [0.1, 0.6], [0.2, 0.3]]))
    assert noisy[:, 1] == pytest.approx([0.8, 0.5, 0.2])
    assert {"plain", "noisy"} <= set(texts(ax)) and nothing_is_cut(ax)


def test_curves_are_of_an_attack_that_every_defense_was_under():
    found = report()
    found.rows = [row for row in found.rows if (row["defense"], row["attack"]) != ("noisy", "pgd")]
    assert "attack fgsm, rule vote, 95 % intervals" in texts(analysis.robustness_curves(found))
    found.rows = [row for row in found.rows if (row["defense"], row["attack"]) != ("noisy", "fgsm")]
    with pytest.raises(ValueError, match="an attack that every defense of the report was under, found none"):
        analysis.robustness_curves(found)


def test_curves_of_a_posterior_show_its_median_and_band():
    eps, draws = np.linspace(0, 0.2, 51), np.random.default_rng(0).uniform(0.4, 0.6, (200, 1, 51))
    curve = RobustnessCurve(
        ["net"], eps, draws, {"net": (eps[[0, 50]], np.array([0.5, 0.5]))}, None, 1.0, 200
    )
    ax = analysis.robustness_curves(curve)
    line, measured = ax.lines
    assert line.get_ydata() == pytest.approx(np.median(draws[:, 0], 0)) and len(measured.get_xdata()) == 2
    band = ax.collections[0].get_paths()[0].get_extents()
    assert 0.39 < band.y0 < 0.42 and 0.58 < band.y1 < 0.61


def test_certified_accuracy_falls_where_the_radii_end():
    label, radius = torch.zeros(10).long(), torch.linspace(0.05, 0.5, 10)
    certificate = Certificate(label, radius, radius, label, sigma=0.25, alpha=0.001)
    ax = analysis.certified_vs_empirical(certificate, label, report(norm="2").only("plain"))
    (line,) = (line for line in ax.lines if to_hex(line.get_color()) == COLORS[0].lower())
    at = dict(zip((0.0, 0.12, 0.33), np.interp((0.0, 0.12, 0.33), *line.get_data()), strict=True))
    assert at == pytest.approx({0.0: 1.0, 0.12: 0.8, 0.33: 0.4}) and nothing_is_cut(ax)
    with pytest.raises(ValueError, match="expected a report in the L2 norm, got norm inf"):
        analysis.certified_vs_empirical(certificate, label, report())


def test_a_certificate_and_an_attack_are_compared_in_the_norm_of_the_certificate():
    label, radius = torch.zeros(10).long(), torch.linspace(0.05, 0.5, 10)
    certificate = Certificate(
        label, radius, radius, label, sigma=0.25, alpha=0.001, norm=1.0, family="laplace"
    )
    ax = analysis.certified_vs_empirical(certificate, label, report(norm="1").only("plain"))
    assert ax.get_xlabel() == "L1 radius (pixels)"
    with pytest.raises(ValueError, match="expected a report in the L1 norm, got norm 2"):
        analysis.certified_vs_empirical(certificate, label, report(norm="2"))


def test_convergence_in_the_draws_says_whether_budgets_are_equal():
    ax = analysis.eot_convergence(report())
    assert dots(ax)[0].tolist() == [[1, pytest.approx(0.7)], [16, pytest.approx(0.3)]]
    assert "gradients per image: 32; 95 % intervals" in texts(ax) and nothing_is_cut(ax)
    unequal = report()
    unequal.rows[-1]["gradients"] = 1280
    assert "gradients per image: 32 to 64, not equal; 95 % intervals" in texts(
        analysis.eot_convergence(unequal)
    )
    with pytest.raises(ValueError, match="expected attacks with draws per call"):
        analysis.eot_convergence(report(draws=(None, None, None)))


def test_noise_scales_have_a_dot_per_fit_and_a_line_over_elements():
    fits = [pd.defenses.rse(tiny_net(), scale="learned", scale_shape="channel") for _ in range(2)]
    with torch.no_grad():
        scales = torch.tensor([0.1, 0.2, 0.3]).log().view(3, 1, 1)
        fits[0].net.get_submodule("4.noise").log_scale.copy_(scales)
    ax = analysis.noise_scales(analysis.to_arviz(fits, tiny_batch(), num_samples=2))
    assert [len(xy) for xy in dots(ax)] == [2, 2]
    (span,) = (line for line in ax.lines if line.get_marker() == "None")
    assert span.get_xdata() == pytest.approx([0.1, 0.3])
    assert {"input_noise", "4.noise"} <= set(texts(ax)) and nothing_is_cut(ax)
    plain = analysis.to_arviz(pd.deterministic(nn.Linear(4, 3)), (torch.rand(3, 4), torch.zeros(3).long()))
    with pytest.raises(ValueError, match="no noise layers"):
        analysis.noise_scales(plain)


def test_entropies_are_cumulative_shares():
    ax = analysis.entropy_clean_attacked(np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 1.5]))
    clean, attacked = ax.lines
    assert clean.get_xdata().tolist() == [0.1, 0.2, 0.3, 0.4] and attacked.get_ydata().tolist() == [0.5, 1.0]
    assert "attacked\nmedian 1.25" in texts(ax) and nothing_is_cut(ax)


def test_reliability_by_hand():
    probs = torch.tensor([[0.85, 0.15]] * 4 + [[0.45, 0.55]] * 2)
    prediction = pd.Prediction(probs.log(), torch.zeros(6), 1)
    ax = analysis.reliability(prediction, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert sorted(xy[0].tolist() for xy in dots(ax)) == [
        pytest.approx([0.55, 1.0]),
        pytest.approx([0.85, 0.75]),
    ]
    assert f"ECE {100 * (4 * 0.1 + 2 * 0.45) / 6:.1f} %" in texts(ax) and nothing_is_cut(ax)


def test_the_change_is_amplified_to_black():
    x = torch.rand(3, 1, 4, 4) * 0.5
    x_adv = x.clone()
    x_adv[0, 0, 0, 0] += 0.25
    axes = analysis.image_grid(x, x_adv, titles=["one", "two", "three"])
    assert axes.shape == (3, 3) and axes[0, 1].get_title() == "two"
    change = np.asarray(axes[2, 0].images[0].get_array())
    assert change[0, 0] == pytest.approx(0.0) and change.sum() == pytest.approx(15.0)
    assert axes[2, 0].get_ylabel() == "change x 4"
    color = analysis.image_grid(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), amplify=1.0)
    assert np.asarray(color[0, 0].images[0].get_array()).shape == (4, 4, 3)


def test_loss_traces_show_the_mean_over_draws():
    table = np.random.default_rng(0).normal(size=(30, 8))
    ax = analysis.loss_traces({"eot": table, "one draw": table[:, 0]})
    assert ax.lines[0].get_ydata() == pytest.approx(table.mean(1))
    assert ax.lines[1].get_ydata() == pytest.approx(table[:, 0]) and nothing_is_cut(ax)


def test_labels_at_the_ends_of_lines_do_not_overlap():
    _, ax = pyplot.subplots()
    ax.set_ylim(0, 1)
    label_ends(ax, list("abcd"), 1.0, [0.5, 0.5, 0.51, 0.99], list(COLORS[:4]))
    heights = sorted(text.xy[1] for text in ax.texts)
    assert min(np.diff(heights)) > 0.06 and max(heights) <= 1.0


@pytest.mark.parametrize(
    "draw",
    [
        analysis.accuracy_chart,
        analysis.robustness_curves,
        analysis.eot_convergence,
        lambda source, ax: analysis.loss_traces({"a": np.ones(3)}, ax=ax),
        lambda source, ax: analysis.entropy_clean_attacked(np.ones(3), np.ones(3), ax=ax),
    ],
)
def test_given_axes_are_drawn_on_and_no_other_figure_is_made(draw):
    figure, ax = pyplot.subplots()
    assert draw(report(), ax=ax) is ax and pyplot.get_fignums() == [figure.number]


def test_text_has_the_color_of_the_running_style():
    with pyplot.style.context("dark_background"):
        ax = analysis.accuracy_chart(report())
        names = [text for text in ax.texts if text.get_text() in ("plain", "noisy")]
        assert {to_hex(text.get_color()) for text in names} == {"#ffffff"}


def test_a_real_report_can_be_drawn():
    data = torch.rand(30, 4), torch.randint(3, (30,))
    found = pd.evaluate(
        pd.deterministic(nn.Linear(4, 3)), data, {"pgd": partial(pd.attacks.pgd, num_steps=2)}, eps=[0.1, 0.2]
    )
    assert len(dots(analysis.robustness_curves(found))[0]) == 3
