"""Plants faults in a copy of the code and sees which tests die of them.

    python benchmarks/faults.py [NAME ...] [--list]

Every fault is a small, plausible mistake that would bend a number. It is planted alone, in a copy of the
repository in a temporary folder, and the tests that should die of it run until the first does. A fault that
no test dies of is a hole in the suite.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

PARTS = ("probdefense", "tests", "benchmarks", "examples", "docs", "pyproject.toml", "README.md")
"""What is copied."""


class Fault(NamedTuple):
    """What is replaced where, and the tests that should die of it."""

    file: str
    right: str
    wrong: str
    tests: str


FAULTS = {
    # core
    "mean field scale without its floor": Fault(
        "ops.py",
        "return rho.exp() + floor if floor else rho.exp()",
        "return rho.exp()",
        "tests/defenses/test_bayesian.py",
    ),
    "KL of a flat site without its logarithm": Fault(
        "core/families.py",
        "return squares / (2 * p.scale**2) - logs - q.loc.numel() / 2",
        "return squares / (2 * p.scale**2) - q.loc.numel() / 2",
        "tests/core/test_defense.py tests/defenses/test_bayesian.py",
    ),
    "KL of local sites not scaled to the data set": Fault(
        "core/vectorized.py",
        "scale = max(self.model.num_data or 0, len(x)) / len(x)",
        "scale = 1.0",
        "tests/evaluation/test_streams_apart.py",
    ),
    "noise off in evaluation mode": Fault(
        "nn/noise.py",
        'if self.when != "always" and (self.when == "train") != self.training:',
        'if not self.training or (self.when != "always" and self.when == "test"):',
        "tests/core/test_defense.py tests/defenses/test_builders.py",
    ),
    "frozen draws that ignore their seed": Fault(
        "core/vectorized.py",
        "keys = Keys(self.model, seed, num_samples, ids, True, device=device, frozen=True)",
        "keys = Keys(self.model, 0, num_samples, ids, True, device=device, frozen=True)",
        "tests/core/test_defense.py",
    ),
    "every draw of a call is the first": Fault(
        "core/streams.py",
        "generator = self._generator(draw, tile + 1)",
        "generator = self._generator(0, tile + 1)",
        "tests/evaluation/test_chunks.py tests/evaluation/test_streams_apart.py",
    ),
    "antithetic noise that is not flipped": Fault(
        "core/streams.py",
        "return site.mirrored(value) if self.antithetic and draw % 2 else value",
        "return value",
        "tests/core/test_antithetic.py",
    ),
    "antithetic weights that are not flipped": Fault(
        "core/streams.py",
        "drawn = drawn.neg_() if self.antithetic and draw % 2 else drawn",
        "pass",
        "tests/core/test_antithetic.py",
    ),
    "an attack that decides on paired draws": Fault(
        "attacks/tools/gradient.py",
        "return logits_fn(x, num_samples, **independent(logits_fn))",
        "return logits_fn(x, num_samples)",
        "tests/core/test_antithetic.py",
    ),
    "local noise of the standard deviation's sum": Fault(
        "core/local.py",
        "variance = _apply(layer, x.square(), moments.weight_variance, moments.bias_variance)",
        "variance = _apply(layer, x.abs(), moments.weight_variance, moments.bias_variance)",
        "tests/core/test_local.py",
    ),
    "an early exit that forgets the radius": Fault(
        "evaluation/standing.py",
        "if each.eps <= run.eps]",
        "]",
        "tests/evaluation/test_standing.py",
    ),
    "every tile of a call is the first": Fault(
        "core/streams.py",
        "generator = self._generator(draw, tile + 1)",
        "generator = self._generator(draw, 1)",
        "tests/evaluation/test_chunks.py",
    ),
    "passes share one draw of the weights": Fault(
        "core/streams.py",
        "generator = self._generator(draw, 0)",
        "generator = self._generator(0, 0)",
        "tests/evaluation/test_streams_apart.py",
    ),
    "dropout not rescaled": Fault(
        "nn/dropout.py", "x * (self.mask(x) / self.keep)", "x * self.mask(x)", "tests/defenses"
    ),
    "the location of a noise is forgotten by the certificate": Fault(
        "core/smoothing.py",
        "torch.distributions.Normal) and not drawn.mean.any():",
        "torch.distributions.Normal):",
        "tests/evaluation/test_certification.py",
    ),
    "the family of a noise is forgotten by the certificate": Fault(
        "core/smoothing.py",
        "exact = scale.detach().cpu().double() * width.detach().cpu().double()",
        "exact = scale.detach().cpu().double()",
        "tests/evaluation/test_certification.py",
    ),
    # rules and losses
    "double softmax in the mean probability": Fault(
        "logits/rules.py",
        "return log_mean_exp(logits.log_softmax(-1))",
        "return log_mean_exp(logits.softmax(-1).log_softmax(-1))",
        "tests/logits tests/evaluation/test_protocol.py",
    ),
    "a tie counts as right": Fault(
        "logits/rules.py",
        "return margins(rule, logits, y) > 0",
        "return margins(rule, logits, y) >= 0",
        "tests/logits tests/evaluation tests/attacks/test_minimum_norm.py",
    ),
    "the log of an average of softmaxes": Fault(
        "logits/losses.py",
        "return -log_mean_exp(_at(logits.log_softmax(-1), y))",
        "return -_at(logits.softmax(-1), y).mean(0).log()",
        "tests/logits",
    ),
    # attacks
    "PGD without its last projection": Fault(
        "attacks/pgd.py",
        "points = ball.project(points + step * ball.steepest(direction, points))",
        "points = (points + step * ball.steepest(direction, points)).clamp(0.0, 1.0)",
        "tests/attacks/test_contract.py",
    ),
    "L2 steps that are not normalized": Fault(
        "ops.py",
        "return gradient / per_example(lp_norm(gradient, 2), gradient).clamp_min(1e-30)",
        "return gradient",
        "tests/test_ops.py",
    ),
    "restarts chosen on the draws that were climbed last": Fault(
        "attacks/tools/selection.py",
        "logits = ask(logits_fn, x, num_samples if logits_fn.stochastic else None)",
        "logits = ask(logits_fn, x, 1 if logits_fn.stochastic else None)",
        "tests/attacks",
    ),
    "targets are climbed away from": Fault(
        "attacks/tools/gradient.py",
        "return values if target is None or toward is not None else -values",
        "return values",
        "tests/attacks",
    ),
    "settling on the frozen draws": Fault(
        "attacks/tools/settle.py",
        "    judge = held_out(logits_fn)\n    ray",
        "    judge = logits_fn\n    ray",
        "tests/attacks/test_minimum_norm.py tests/attacks/test_scale.py",
    ),
    "repeats that count the first batch of draws alone": Fault(
        "attacks/tools/gradient.py",
        "return Gradient(torch.stack(gradients).mean(0), torch.stack(values).mean(0), torch.cat(logits))",
        "return Gradient(gradients[0], torch.stack(values).mean(0), torch.cat(logits))",
        "tests/attacks",
    ),
    "a lucky value of Square is kept on a random defense": Fault(
        "attacks/square.py",
        "fresh = queries.values(points if queries.stochastic else points[1:])",
        "fresh = queries.values(points[1:])",
        "tests/attacks/test_queries.py tests/attacks/test_contract.py",
    ),
    # evaluation
    "the attack climbs the draws of the verdict": Fault(
        "evaluation/points.py",
        "cost, start = counted(Keyed(logits_fn, key, draw_chunk)), time.perf_counter()",
        'key = derive(seed, "verdict")\n    logits_fn = logits_fn.keyed(derive(key, 0), chunk.ids, 10)'
        ' if hasattr(logits_fn, "keyed") else logits_fn\n'
        "    cost, start = counted(Keyed(logits_fn, key, draw_chunk)), time.perf_counter()",
        "tests/evaluation/test_streams_apart.py",
    ),
    "every block of verdict draws reuses one seed": Fault(
        "prediction/drawing.py",
        "derive(seed, start)",
        "derive(seed, 0)",
        "tests/evaluation/test_streams_apart.py",
    ),
    "all attacks share one seed": Fault(
        "evaluation/points.py",
        'key = derive(seed, "attack", run.label, exact(run.eps))',
        'key = derive(seed, "attack")',
        "tests/evaluation/test_streams_apart.py",
    ),
    "all chunks share the draws of the first": Fault(
        "evaluation/points.py",
        "key = derive(key, chunk.number)",
        "key = derive(key, 0)",
        "tests/evaluation",
    ),
    "an attack sees one draw where many were asked for": Fault(
        "evaluation/points.py",
        "points = run.attack(Samples(cost, num_samples),",
        "points = run.attack(Samples(cost, 1),",
        "tests/evaluation",
    ),
    "the worst case is chosen by the verdict": Fault(
        "evaluation/verdicts.py",
        "drawn = draw_groups(self.logits_fn, points, SELECTION_SAMPLES, selection, first, self.kept)",
        "drawn = groups",
        "tests/evaluation",
    ),
    "distances compared without a tolerance": Fault(
        "evaluation/rows.py",
        'inside = distance <= reach(radius, threat.norm, asked["pixels"], asked["dtype"])',
        "inside = distance <= radius",
        "tests/evaluation/test_points.py",
    ),
    "a point outside the ball is let through": Fault(
        "evaluation/points.py",
        "if not bool(threat.inside(distance, eps, x).all()):",
        "if bool((distance > 2 * eps + 1).any()):",
        "tests/evaluation/test_protocol.py",
    ),
    "Wilson's interval without its correction": Fault(
        "evaluation/intervals.py",
        "center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)",
        "center = share",
        "tests/evaluation/test_intervals.py",
    ),
    "shared draws taken for independent ones": Fault(
        "prediction/drawing.py",
        'return "shared" if getattr(logits_fn, "shares_draws", can_freeze(logits_fn)) else "independent"',
        'return "independent"',
        "tests/evaluation/test_protocol.py",
    ),
    # certification
    "a certificate bounds the votes that chose the class": Fault(
        "evaluation/ballots.py",
        "    chosen = _votes(defense, x, n0).argmax(-1)\n    wins, trials",
        "    state = torch.get_rng_state()\n    chosen = _votes(defense, x, n0).argmax(-1)\n"
        "    torch.set_rng_state(state)\n    wins, trials",
        "tests/evaluation/test_streams_apart.py",
    ),
    "a certificate with a two-sided level": Fault(
        "evaluation/ballots.py",
        "return np.where(wins == 0, 0.0, betaincinv(np.maximum(wins, 1), trials - wins + 1, alpha))",
        "return np.where(wins == 0, 0.0, betaincinv(np.maximum(wins, 1), trials - wins + 1, 2 * alpha))",
        "tests/evaluation/test_certification.py",
    ),
    "a certificate for the largest of several scales": Fault(
        "evaluation/grounds.py",
        "smallest = float(scale.min())",
        "smallest = float(scale.max())",
        "tests/evaluation/test_certification.py tests/evaluation/test_noises.py",
    ),
    # checks
    "undeclared randomness goes unseen": Fault(
        "checks/outputs.py",
        "repeated = [function(bench.x, 2) for _ in range(3)]",
        "repeated = [first for _ in range(3)]",
        "tests/checks",
    ),
    "the check of the gradient looks at the attack's own step": Fault(
        "checks/gradients.py",
        "found.append(climbed(function(point)) - here.value)",
        "found.append(((point - x) * here.gradient).flatten(1).sum(1))",
        "tests/checks",
    ),
    "the best point met is the last one": Fault(
        "checks/optimization.py",
        "met = bench.correct(watched.best.x)",
        "met = final",
        "tests/checks",
    ),
    # adaptation
    "RMC trains on its validation examples": Fault(
        "adaptation/cleansing.py",
        "self._train(everything[~torch.isin(everything, validation)], validation)",
        "self._train(everything, validation)",
        "tests/adaptation",
    ),
    "RMC moves when it is only simulated": Fault(
        "adaptation/cleansing.py",
        "        twin = self._twin()\n        with forked(seed, x.device):",
        "        twin = self\n        with forked(seed, x.device):",
        "tests/adaptation",
    ),
    "RMC keeps the last weights instead of the best": Fault(
        "adaptation/cleansing.py",
        "                parameter.copy_(value)\n",
        "                pass\n",
        "tests/adaptation",
    ),
}


def planted(folder: Path, fault: Fault) -> None:
    """Replaces the right text, which must be there once.

    Raises:
        SystemExit: it is not.
    """
    path = folder / "probdefense" / fault.file
    text = path.read_text()
    if text.count(fault.right) != 1:
        sys.exit(f"expected once in {fault.file}, found {text.count(fault.right)} times: {fault.right!r}")
    path.write_text(text.replace(fault.right, fault.wrong))


def killer(folder: Path, tests: str) -> str | None:
    """The first test that dies, None if all live."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", answer.stdout, re.M)
    return None if answer.returncode == 0 else (found[1] if found else answer.stdout[-300:])


def main(names: list[str]) -> None:
    lived = []
    for name in names or FAULTS:
        fault = FAULTS[name]
        with tempfile.TemporaryDirectory() as scratch:
            for part in PARTS:
                source = ROOT / part
                copy = shutil.copytree if source.is_dir() else shutil.copy
                copy(source, Path(scratch) / part)
            planted(Path(scratch), fault)
            test = killer(Path(scratch), fault.tests)
        lived += [] if test else [name]
        print(f"{'killed' if test else 'LIVED '}  {name}: {test or fault.tests}", flush=True)
    print(f"{len(lived)} of {len(names or FAULTS)} lived")
    sys.exit(bool(lived))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="which faults; all of them by default")
    parser.add_argument("--list", action="store_true", help="only name them")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(FAULTS))
    else:
        main(asked.names)
