"""What the scripts of this folder share: scales, data, trainings and verdicts that resume, and the result.

A script is a list of experiments over the public API. It yields rows, each a figure with its interval, as
rows of a report have them; `run` writes them with settings, seeds, versions, hardware and CPU seconds to
``docs/results/<item>.json``, from which ``pages.py`` makes the page.
"""

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd
from probdefense import attacks, objectives, training

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results"
PICTURE = "picture.png"
PACKAGES = ("probdefense", "torch", "pyro-ppl", "numpy")

Row = dict[str, Any]
Scales = Mapping[str, Mapping[str, Any]]


def small_net(data: str) -> nn.Module:
    """A network that two cores train in a minute: of the digits, or of images of 28 x 28 pixels."""
    return pd.models.small_cnn() if data == "digits" else pd.models.strided_cnn()


@dataclass
class Lab:
    """One run of one script at one scale.

    Attributes:
        item: The stem of its files.
        scale: ``"smoke"``, ``"cpu"`` or ``"gpu"``.
        sizes: What this scale means: data, images, epochs, seeds, and what the script asks for itself.
        work: A folder for checkpoints and journals: a run that was killed goes on there.
    """

    item: str
    scale: str
    sizes: Mapping[str, Any]
    work: Path
    trained_seconds: dict[str, float] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name in ("sizes", "__setstate__") or name not in self.sizes:
            raise AttributeError(name)
        return self.sizes[name]

    @cached_property
    def split(self) -> pd.data.Split:
        """The training and test images of this scale."""
        whole = pd.data.load(self.data, os.environ.get("PROBDEFENSE_DATA"))
        counts = (self.sizes.get("train_images"), self.sizes["images"])
        parts = [TensorDataset(*(t[:n] for t in part.tensors)) for part, n in zip(whole, counts, strict=True)]
        return pd.data.Split(*parts)

    @property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The test images and labels of this scale."""
        x, y = self.split.test.tensors
        return x, y

    @property
    def num_data(self) -> int:
        """Training images."""
        return len(self.split.train)

    def net(self) -> nn.Module:
        """A fresh network for the data."""
        return small_net(self.data)

    def inner_attack(self, eps: float | None = None, **options: Any) -> Any:
        """The inner maximization of one adversarial training: PGD whose radius grows, counting its steps."""
        grows = self.sizes.get("warm_up", 0.1)
        steps = max(1, round(grows * self.epochs * -(-self.num_data // self.batch_size)))
        inner = partial(attacks.pgd, num_steps=self.sizes.get("inner_steps", 4), **options)
        return objectives.warm_up(inner, eps=self.eps if eps is None else eps, num_steps=steps)

    def adversarial(self, objective: Any = objectives.elbo) -> Any:
        """The objective on attacked images."""
        return objectives.adversarial(objective, self.inner_attack())

    def trained(
        self,
        label: str,
        seed: int,
        build: Callable[[], Any],
        objective: Any = objectives.elbo,
        **options: Any,
    ) -> Any:
        """A defense, trained once by Adam, a cosine schedule and an average of weights, or read again.

        Every row of a table gets the same data, epochs, batch size, schedule and average.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            defense = build()
        place = self.work / f"{label}-{seed}.safetensors"
        if place.exists():
            return self._read(place, label, seed, defense)
        rate = options.pop("learning_rate", self.learning_rate)
        epochs = options.pop("epochs", self.epochs)
        optimizer = torch.optim.Adam(defense.param_groups(), lr=rate, fused=True)
        start = time.process_time()
        training.fit(
            defense,
            DataLoader(options.pop("train", self.split.train), self.batch_size, shuffle=True),
            epochs=epochs,
            objective=objective,
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
            average=training.ema(0.99),
            seed=seed,
            progress=False,
            **options,
        )
        seconds = time.process_time() - start
        place.parent.mkdir(parents=True, exist_ok=True)
        pd.save(defense.eval(), place, cpu_seconds=seconds)
        self.trained_seconds[f"{label}-{seed}"] = seconds
        return defense

    def _read(self, place: Path, label: str, seed: int, defense: Any) -> Any:
        loaded = pd.load(place, defense=defense).eval()
        self.trained_seconds[f"{label}-{seed}"] = loaded.notes["cpu_seconds"]
        return loaded

    def judged(self, defense: Any, name: str, attacked_by: Mapping[str, Any], **options: Any) -> pd.Report:
        """The verdict on the test images, resumed from its journal."""
        asked: dict[str, Any] = {"eps": self.sizes.get("eps", 0.1), "num_samples": self.num_samples}
        journal = self.work / "journal" / f"{name}-{options.get('seed', 0)}"
        asked |= {"rules": (pd.rules.mean_prob,), "data": self.test, "journal": journal}
        asked |= options
        return pd.evaluate(defense, attacks=dict(attacked_by), name=name, **asked)

    def drawn(self, images: Mapping[str, torch.Tensor]) -> None:
        """A picture for the page: a row of images under each name."""
        from matplotlib.figure import Figure

        count = max(len(row) for row in images.values())
        sheet = Figure(figsize=(count, len(images)), dpi=60)
        for i, ax in enumerate(sheet.subplots(len(images), count, squeeze=False).flat):
            name = list(images)[i // count]
            ax.imshow(images[name][i % count].permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[], ylabel="" if i % count else name.replace("_", "\n"))
        sheet.tight_layout(pad=0.2)
        sheet.savefig(self.work / PICTURE)


def figure(table: str, name: str, row: Mapping[str, Any], *, paper: float | None = None, **more: Any) -> Row:
    """A row of a report as one figure of a table, in percent where it is an accuracy.

    Args:
        table: The title of its table.
        name: What stands at its left.
        row: Of a report or a comparison, with ``low`` and ``high``.
        paper: The figure that the paper has, in percent.
        more: What else names the number: attack, seed, note.
    """
    value = next(key for key in ("accuracy", "difference", "mean", "value") if key in row)
    kept = {key: row[key] for key in ("attack", "eps", "rule", "num_samples", "gradients") if key in row}
    found = {value: row[value], "low": row["low"], "high": row["high"]}
    return {"table": table, "name": name, **kept, **found, "paper": paper, **more}


def run(item: str, about: str, rows: Callable[[Lab], Iterable[Row]], scales: Scales) -> None:
    """Runs a script from the command line and writes its result."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--scale", choices=("smoke", "cpu", "gpu"), default="smoke")
    parser.add_argument("--out", type=Path, help="folder of the result; docs/results for cpu and gpu")
    parser.add_argument("--work", type=Path, default=Path("reproduce"), help="checkpoints and journals")
    asked = parser.parse_args()
    out = asked.out or (RESULTS if asked.scale != "smoke" else asked.work)
    made = result(item, about, asked.scale, rows, scales, asked.work)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{item}.json").write_text(json.dumps(made, indent=1) + "\n")
    picture = asked.work / item / asked.scale / PICTURE
    if picture.exists():
        shutil.copy(picture, out / f"{item}.png")
    print(f"wrote {out / f'{item}.json'}")


def result(
    item: str, about: str, scale: str, rows: Callable[[Lab], Iterable[Row]], scales: Scales, work: Path
) -> dict[str, Any]:
    """The result of a script at a scale, as plain data."""
    lab, made = Lab(item, scale, scales[scale], work / item / scale), []
    with spent(lab.work / "cpu_seconds.txt") as seconds:
        for row in rows(lab):
            made.append(row)
            print(json.dumps(row), flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "item": item,
        "scale": scale,
        "command": f"python examples/reproduce/{item}.py --scale {scale}",
        "about": " ".join(about.split("\n\n")[2:]).replace("\n", " ").strip(),
        "title": about.partition("\n")[0],
        "settings": dict(scales[scale]),
        "seeds": list(scales[scale]["seeds"]),
        "versions": {name: version(name) for name in PACKAGES},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}, {gpu}",
        "cpu_seconds": round(seconds[0]),
        "training_cpu_seconds": {k: round(v, 1) for k, v in lab.trained_seconds.items()},
        "rows": made,
    }


@contextmanager
def spent(place: Path) -> Iterator[list[float]]:
    """CPU seconds of a block, added to those of earlier runs that were interrupted."""
    place.parent.mkdir(parents=True, exist_ok=True)
    before = float(place.read_text()) if place.exists() else 0.0
    start, seconds = time.process_time(), [before]
    try:
        yield seconds
    finally:
        seconds[0] = before + time.process_time() - start
        place.write_text(f"{seconds[0]:.1f}\n")
