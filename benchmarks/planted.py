"""Which planted faults the checks find, at the quick look and at their defaults, as a page of the docs.

    python benchmarks/planted.py [--quick] [NAME ...]

Writes docs/planted.md; with --quick or names it only prints.
"""

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import probdefense as pd  # noqa: E402
from tests.checks.planted import PLANTED, outcome  # noqa: E402
from tests.conftest import trained_on_digits  # noqa: E402

EPS, IMAGES = 0.1, 150
BUDGETS: dict[str, dict[str, Any]] = {
    "quick look": {"num_gradients": 64, "num_samples": 4, "num_verdict": 20},
    "default": {},
}
HEAD = f"""# Planted faults

What makes a network look robust without making it so, planted in a network of digits that nothing defends,
and what [`checks.run`][probdefense.checks.run] says: l-inf, eps {EPS}, {IMAGES} images. A fault is *found* if
one of the checks that know it fires; *not enough budget* means that the run says so itself. `python
benchmarks/planted.py` writes this page from the table in `tests/checks/planted.py`.

| fault | known by | quick look | default |
|---|---|---|---|
"""


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    names = [name for name in arguments if name in PLANTED] or list(PLANTED)
    budgets = ["quick look"] if "--quick" in arguments else list(BUDGETS)
    defense, data = trained_on_digits(pd.deterministic, IMAGES)
    rows = []
    for name in names:
        fault = PLANTED[name]
        made = [pd.checks.run(fault.make(defense.net), *data, eps=EPS, **BUDGETS[b]) for b in budgets]
        fired = dict.fromkeys(each for found in made for each in fault.checks if found[each].fired)
        rows.append(f"| {name} | {', '.join(fired)} | {' | '.join(outcome(f, fault) for f in made)} |")
        print(rows[-1], flush=True)
    if not arguments:
        (ROOT / "docs" / "planted.md").write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
