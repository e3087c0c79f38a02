"""How defenses are trained on each data set: one budget for all rows, warm-up, averages, augmentation."""

from dataclasses import dataclass, replace

UNTUNED = 4e-3
"""Learning rate of every recipe on data that no sweep was made on: what suits digits may be too high."""


@dataclass(frozen=True)
class Plan:
    """The training that all defenses of a study share; study files have these under ``[training]``.

    Attributes:
        net: A network of `probdefense.models`, ``torchvision:NAME`` or ``FILE.py:NAME``.
        epochs: Of every training.
        attacked_epochs: Of those under attack; `epochs` if None.
        learning_rate: Of every training; None for that of each recipe, tuned on digits.
        attacked_learning_rate: Of those under attack; `learning_rate` if None.
        batch_size: Images per step.
        warm_up: Share of a training in which the radius of its attack grows.
        inner_steps: PGD steps of a training under attack.
        weight_average: Decay of the average of weights that ends every training; 0 for none.
        crop: By how many pixels training images move.
        flip: Whether they are mirrored half of the time.
        images: So many training images, from the first on; None for all.
        workers: Processes that load training images.
    """

    net: str = "small_cnn"
    epochs: int = 46
    attacked_epochs: int | None = None
    learning_rate: float | None = None
    attacked_learning_rate: float | None = None
    batch_size: int = 64
    warm_up: float = 5 / 46
    inner_steps: int = 4
    weight_average: float = 0.99
    crop: int = 0
    flip: bool = False
    images: int | None = None
    workers: int = 0

    def rate(self, tuned: float, attacked: bool) -> float:
        """The learning rate of a training, given the one tuned for its recipe on digits."""
        asked = self.attacked_learning_rate if attacked else None
        found = self.learning_rate if asked is None else asked
        return tuned if found is None else found

    def length(self, attacked: bool) -> int:
        """The epochs of a training."""
        return self.attacked_epochs or self.epochs if attacked else self.epochs


MNIST = Plan("strided_cnn", 12, 14, 2e-3, 4e-3, warm_up=4 / 14, inner_steps=5)

PLANS = {
    "digits": Plan(),
    "mnist-5k": MNIST,
    "mnist": replace(MNIST, epochs=5, attacked_epochs=5),
    "fashion-mnist": replace(MNIST, epochs=5, attacked_epochs=5),
    "cifar10": Plan("resnet20", 30, learning_rate=2e-3, batch_size=128, crop=4, flip=True),
    "stl10": Plan("resnet20", 30, learning_rate=2e-3, batch_size=128, crop=12, flip=True),
}
"""By data set. Digits: a sweep (``benchmarks/tuning.py``). mnist-5k: measured, clean 97 and worst 75 under
PGD-50 and DLR-50 at 0.3 for PGD training; without warm-up it stays at 10. The others are not tuned."""

SMOKE = Plan(epochs=5, learning_rate=UNTUNED)
"""A small network for a few epochs: of data of one's own, and of ``--quick`` on data other than digits. On
color images it is a smoke test, which shows that everything runs, and no result."""


def plan_for(data: str, quick: bool, quick_epochs: int) -> Plan:
    """The training that a data set gets by default."""
    if not quick:
        return PLANS.get(data, SMOKE)
    if data == "digits":
        return replace(PLANS[data], epochs=quick_epochs)
    return replace(SMOKE, epochs=max(1, quick_epochs // 9))
