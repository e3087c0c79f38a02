"""Study files: all that is asked of the main job, as TOML that a person can read, change and run again."""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from probdefense.checks.comparisons import FEWEST_QUERIES
from probdefense.files import check_file
from probdefense.study import plugins
from probdefense.study.keys import check_keys, check_values
from probdefense.study.plans import Plan
from probdefense.study.recipes import RECIPES, Variant
from probdefense.study.request import FULL, Request
from probdefense.validation import check_count, check_member, check_positive, check_share

NORMS = {"inf": math.inf, "2": 2.0, "1": 1.0}
"""The norms of a threat model, as files spell them."""

SIZES = {name: count for name, count in FULL.items() if name != "epochs"}

LEAST = {"check_gradients": FEWEST_QUERIES}
"""Below these there is nothing to see."""

TOP: dict[str, Any] = {
    **{"data": "digits", "data_root": "data", "net": "small_cnn", "eps": 0.2, "norm": None},
    **{"num_samples": 50, "seed": 0, "seeds": None, "quick": False, "device": "cpu", "recipes": None},
    **SIZES,
    **{"training": None, "defense": None, "attack": None},
}
"""Keys of a study, with values of their kinds; None where the kind is looked at elsewhere."""

TRAINING = {
    **{each.name: each.default for each in fields(Plan) if each.name != "net"},
    **{"attacked_epochs": 46, "learning_rate": 0.01, "attacked_learning_rate": 0.01, "images": 1000},
}

NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*")


def read(path: Path) -> dict[str, Any]:
    """The fields of a `Request` that a study file sets; the recipes that it names are loaded.

    Raises:
        ValueError: not TOML, an unknown key (with the nearest known one), or a value of another kind.
        OSError: the file cannot be read.
    """
    check_file(path, "a study")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a study in TOML in {path}, got something else ({error})") from error
    check_keys(str(path), content, TOP)
    check_values(str(path), content, TOP)
    found = {name: content[name] for name in PLAIN if name in content}
    if "data_root" in content:
        found["data_root"] = Path(content["data_root"])
    if "recipes" in content:
        found["recipes"] = tuple(map(Path, _texts("recipes", content["recipes"])))
        plugins.found(found["recipes"])
    if "norm" in content:
        spelled = f"{content['norm']:g}" if isinstance(content["norm"], float) else str(content["norm"])
        check_member("norm", spelled, NORMS)
        found["norm"] = NORMS[spelled]
    found |= seeded(_counts("seeds", content["seeds"])) if "seeds" in content else {}
    found["sizes"] = {
        name: check_count(name, content[name], LEAST.get(name, 1)) for name in SIZES if name in content
    }
    found["training"] = _training(content.get("training", {}))
    if "defense" in content:
        found["defenses"], found["variants"] = _rows(content["defense"], "defense", "recipe", _variant)
    if "attack" in content:
        found["attacks"], found["shots"] = _rows(content["attack"], "attack", "attack", _shot)
    return found


PLAIN = ("data", "net", "eps", "num_samples", "seed", "quick", "device")


def seeded(seeds: tuple[int, ...]) -> dict[str, Any]:
    """The fields of a `Request` for these seeds; one alone is the seed of everything.

    Raises:
        ValueError: none.
    """
    if not seeds:
        raise ValueError("expected at least one seed, got none; give whole numbers, as in 0,1,2")
    return {"seed": seeds[0], "seeds": seeds if len(seeds) > 1 else ()}


def _counts(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected {key} as whole numbers in brackets, as in [0, 1, 2], got {value!r}")
    return tuple(check_count(key, each, least=0) for each in value)


def _texts(key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"expected {key} as texts in brackets, as in ['mine.py'], got {value!r}")
    return value


def _training(given: Any) -> dict[str, Any]:
    """The part of the plan that a file sets."""
    if not isinstance(given, dict):
        raise ValueError(f"expected [training] as a table, got {given!r}")
    check_keys("[training]", given, TRAINING)
    check_values("[training]", given, TRAINING)
    for name, value in given.items():
        like = TRAINING[name]
        if type(like) is int:
            check_count(f"{name} in [training]", value, least=0 if name in ("crop", "workers") else 1)
        elif name in ("warm_up", "weight_average"):
            check_share(f"{name} in [training]", value, ends="[)")
        elif type(like) is float:
            check_positive(f"{name} in [training]", value)
    return {name: float(v) if type(TRAINING[name]) is float else v for name, v in given.items()}


def _rows(tables: Any, kind: str, key: str, variant: Any) -> tuple[tuple[str, ...], dict[str, Variant]]:
    """Names in order, and what they stand for where it is not what they say."""
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise ValueError(f"expected [[{kind}]], one table each, got {tables!r}")
    found: dict[str, Variant] = {}
    for table in tables:
        if not isinstance(table.get(key), str):
            raise ValueError(
                f"expected {key} in every [[{kind}]], got one with {', '.join(table) or 'nothing'}"
            )
        of, name = table[key], table.get("name", table[key].rpartition(":")[2])
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == "worst":
            raise ValueError(
                f"expected the name of a {kind} as letters, digits and underscores, got {name!r}"
            )
        if name in found:
            raise ValueError(f"expected a name for every {kind}, got {name!r} twice; give name = '...'")
        rest = {k: v for k, v in table.items() if k not in (key, "name")}
        found[name] = variant(of, rest)
    own = {name: each for name, each in found.items() if each != Variant(name, {})}
    return tuple(found), own


def _variant(of: str, given: dict[str, Any]) -> Variant:
    """A recipe with those of its arguments that are not the ones by default."""
    check_member("defense", of, [*RECIPES, "all"])
    where = f"the defense {of}"
    defaults = RECIPES[of].arguments if of in RECIPES else {}
    check_keys(where, given, [*defaults, "epochs", "learning_rate"])
    check_values(where, given, {**defaults, "epochs": 46, "learning_rate": 0.01})
    epochs = check_count(f"epochs in {where}", given["epochs"]) if "epochs" in given else None
    rate = (
        check_positive(f"learning_rate in {where}", given["learning_rate"])
        if "learning_rate" in given
        else None
    )
    own = {name: value for name, value in given.items() if name in defaults and value != defaults[name]}
    return Variant(of, own, epochs, rate)


def _shot(of: str, given: dict[str, Any]) -> Variant:
    return Variant(of, given)


def written(request: Request) -> str:
    """The study that this request, as `prepare` gave it, comes to: running it gives the same report."""
    plan = request.plan
    top: dict[str, Any] = {
        "data": request.data,
        "data_root": None if request.data_root is None else str(request.data_root),
        "net": plan.net,
        "eps": request.radius,
        "norm": next(name for name, norm in NORMS.items() if norm == request.norm),
        "num_samples": request.num_samples,
        "seeds": list(request.all_seeds),
        "quick": request.quick,
        "device": request.device,
        "recipes": [str(path) for path in request.recipes],
        **{name: request.size[name] for name in SIZES},
    }
    parts = [_table("", top), _table("[training]", {name: getattr(plan, name) for name in TRAINING})]
    for name in request.defenses:
        asked = request.variant(name)
        arguments = {**RECIPES[asked.of].arguments, **asked.arguments}
        rest = {"epochs": asked.epochs, "learning_rate": asked.learning_rate}
        parts.append(_table("[[defense]]", {"recipe": asked.of, "name": name, **arguments, **rest}))
    for name in request.attacks:
        shot = request.shot(name)
        parts.append(_table("[[attack]]", {"attack": shot.of, "name": name, **shot.arguments}))
    return "\n".join(parts)


def _table(head: str, values: Mapping[str, Any]) -> str:
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    return "\n".join([*([head] if head else []), *lines]) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML writes it; its texts are those of JSON."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
