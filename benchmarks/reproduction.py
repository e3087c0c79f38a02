"""Every recipe on MNIST or Fashion-MNIST: clean, under PGD, and under the attack made for it.

    python benchmarks/reproduction.py DATA_ROOT [fashion-mnist] [name,name]

A part of the training set and a few epochs, so that two cores do it in half an hour: the figures show
each trade-off and what the adaptive attack leaves of it, not the last point of accuracy.
"""

import sys
from pathlib import Path

from torch.utils.data import TensorDataset

import probdefense as pd
from probdefense.prediction.drawing import is_adaptive
from probdefense.study.opponents import named_attack
from probdefense.study.recipes import RECIPES, Workshop, learning_rates

TRAIN, TEST, EPOCHS, GRADIENTS, ADAPTIVE = 12_000, 200, 4, 64, 50


def part(data: TensorDataset, count: int) -> TensorDataset:
    """The first examples."""
    return TensorDataset(*(tensor[:count] for tensor in data.tensors))


def main() -> None:
    """Prints one line of a Markdown table per recipe, with 95 % intervals."""
    root, name = Path(sys.argv[1]), [*sys.argv[2:], "fashion-mnist"][0]
    names = sys.argv[3].split(",") if len(sys.argv) > 3 else list(RECIPES)
    whole = pd.data.load(name, root)
    data = pd.data.Split(part(whole.train, TRAIN), part(whole.test, TEST))
    eps = pd.data.SOURCES[name].eps
    shop = Workshop(data, eps, EPOCHS, rates=learning_rates(name))
    print(f"{name}, eps {eps:g}, {TRAIN} training images, {EPOCHS} epochs, {GRADIENTS} gradients per image")
    print("| defense | images | clean | PGD | adaptive |\n|---|---|---|---|---|", flush=True)
    for recipe in names:
        defense = shop.make(recipe)
        shown = [(recipe, defense)]
        if is_adaptive(defense):
            shown.insert(0, (f"{recipe}_static", defense.static))
        count = ADAPTIVE if is_adaptive(defense) else TEST
        test = tuple(tensor[:count] for tensor in data.test.tensors)
        for label, model in shown:
            own = RECIPES[recipe].opponent if model is defense else RECIPES["madry"].opponent
            attacks = {"pgd": named_attack("pgd", model, GRADIENTS), "adaptive": own(model, GRADIENTS)}
            report = pd.evaluate(model, test, attacks, eps=eps, rules=(pd.rules.mean_prob,), name=label)
            cells = [
                f"{100 * row['accuracy']:.1f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
                for row in report.rows
                if row["attack"] != "worst"
            ]
            print(f"| {label} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
