"""What a study is: backbones x paradigms x objectives x seeds under one budget of training FLOPs, read from YAML."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lion_st.engines import engine_settings
from lion_st.errors import UsageError
from lion_st.training.cost import CARDS, UTILISATION
from lion_st.training.options.reader import read_yaml
from lion_st.training.recipes import BACKBONES, OBJECTIVES, PAPER_PARADIGMS, PARADIGMS, Objective, Paradigm

Domain: TypeAlias = Literal["in_domain", "zero_shot"]
DOMAIN_NAMES: dict[Domain, str] = {"in_domain": "in domain", "zero_shot": "zero-shot"}
DOMAINS = tuple(DOMAIN_NAMES)
HELD_OUT = "held_out"  # the test set that a study cuts from its own training data
OWN_TEXTS = "train"  # the documents of the study's training data, as texts of the MNTP stage
# Options of `lion-st train` and `lion-st adapt` that the study decides on itself.
DECIDED = (
    "backbone", "paradigm", "objective", "model", "num_layers", "layers", "train_data", "train_subset", "train_split",
    "train_queries", "train_documents", "max_steps", "max_seconds", "num_train_epochs", "seed", "output_dir", "dry_run",
    "dry_run_devices", "config", "push_to_hub", "resume_from_checkpoint", "early_stopping_patience",
)  # fmt: skip
DECIDED_OF_MNTP = (
    "backbone", "num_layers", "layers", "max_seconds", "num_train_epochs", "output_dir", "config", "merge",
    "push_to_hub", "resume_from_checkpoint", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class BackboneChoice:
    """A size of the study: a model, perhaps some of its layers alone, and the recipe whose settings it trains with."""

    name: str
    recipe: str
    model: str
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TestSet:
    """A test set of the study, whole or its first queries with their documents and the first of the others."""

    __test__ = False  # pytest looks at names

    name: str
    source: str
    domain: Domain
    split: str = "test"
    documents: int | None = None
    queries: int | None = None


@dataclass(frozen=True)
class Condition:
    """Training options of those cells alone that have this backbone, paradigm and objective (None: any)."""

    options: Mapping[str, Any]
    backbone: str | None = None
    paradigm: str | None = None
    objective: str | None = None

    def holds(self, backbone: str, paradigm: str, objective: str) -> bool:
        """Whether a cell is one of those."""
        pairs = ((self.backbone, backbone), (self.paradigm, paradigm), (self.objective, objective))
        return all(wanted in (None, found) for wanted, found in pairs)


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
        name: Title of the report.
        backbones: Sizes, each with the name that tables give it.
        paradigms, objectives, seeds, label_noise: The other axes of the grid; noise is the share of training queries
            whose documents and scores were shuffled among them.
        flops: Training FLOPs of a cell; several are one more axis of the grid.
        includes_mntp: Whether those of its backbone's MNTP stage come out of them.
        lengths: Tokens of texts that the plan counts with: "measured" on a sample of the training data, "full", as
            many as are read at most, or the means of queries and documents.
        mntp: Options of `lion-st adapt` for every backbone; None trains the backbones as they are.
        training: Options of `lion-st train` for every cell, over those of the recipe.
        where: Options for some cells alone, over those.
        data: Source of the training tuples, with the keywords of `lion_st.data.load_tuples`.
        hold_out: Documents of the training data that become, with their queries, the test set `held_out`.
        overlap: "refuse" test sets whose texts are trained on, or "report" them. In domain only queries count.
        tests: Test sets.
        dev: Source and split of the development set on which hybrid cells fit the weights of their two scores; without
            one they fuse by reciprocal ranks.
        metrics: The first is the main one.
        top_k: Documents retrieved per query.
        entropy_negatives: Random documents that the contrastive entropy compares each query's relevant one with.
        engine: Index engine.
        dtype: Of the weights in the evaluation.
        keep_weights: Whether trained weights stay when a cell is finished.
        flops_per_second: Of the machine, for the estimated time; of the name of a card, what it reaches.
    """

    name: str
    backbones: tuple[BackboneChoice, ...]
    paradigms: tuple[Paradigm, ...]
    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    label_noise: tuple[float, ...]
    flops: tuple[float, ...]
    includes_mntp: bool
    lengths: str | tuple[float, float]
    mntp: Mapping[str, Any] | None
    training: Mapping[str, Any]
    where: tuple[Condition, ...]
    data: Mapping[str, Any]
    hold_out: int
    overlap: str
    tests: tuple[TestSet, ...]
    dev: tuple[str, str] | None
    metrics: tuple[str, ...]
    top_k: int
    entropy_negatives: int
    engine: str
    dtype: str
    keep_weights: bool
    flops_per_second: float

    def of_data(self) -> dict[str, Any]:
        """What decides on the training data and the test sets that the study makes."""
        tests = [asdict(test) for test in self.tests]
        return {"data": dict(self.data), "hold_out": self.hold_out, "tests": tests, "noise": list(self.label_noise)}

    def of_evaluation(self) -> dict[str, Any]:
        """What decides on a cell's rows beside its training."""
        names = ("metrics", "top_k", "entropy_negatives", "engine", "dtype")
        dev = {} if self.dev is None else {"dev": list(self.dev)}
        return {"tests": [asdict(test) for test in self.tests]} | {name: getattr(self, name) for name in names} | dev


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that change with a value of JSON."""
    text = json.dumps(value, sort_keys=True, default=lambda one: asdict(one))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_study(path: str | Path) -> Study:
    """Read a study's YAML file.

    Raises:
        FileNotFoundError: If it is not there.
        UsageError: If it is not YAML, a key is unknown or missing, or a value is not one that it may have.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no study {str(path)!r}: give a YAML file, see training_scripts/studies.")
    values = read_yaml(file.read_text(encoding="utf-8-sig"), path)
    if not isinstance(values, dict):
        raise UsageError(f"{path} is not a mapping of a study's settings, such as `backbones:` and `budget:`.")
    return parse_study(values, str(path))


def parse_study(values: Mapping[str, Any], place: str = "The study") -> Study:
    """A study of the values of its file.

    Args:
        values: As YAML has them.
        place: What errors begin with.

    Raises:
        UsageError: See `read_study`.
    """
    needed = ("backbones", "budget", "data", "evaluation")
    optional = ("name", "paradigms", "objectives", "seeds", "label_noise", "mntp", "training", "machine")
    top = _Section(values, place, needed, optional)
    budget = top.section("budget", ("flops",), ("includes_mntp", "lengths"))
    data = top.section("data", ("train",), ("subset", "split", "queries", "documents", "hold_out", "overlap"))
    rating = top.section(
        "evaluation", (), (*DOMAINS, "dev", "metrics", "top_k", "entropy_negatives", "engine", "dtype", "keep_weights")
    )
    training, where = _training(top)
    mntp = None if top.values.get("mntp") is None else _options(top, "mntp", "adapt", DECIDED_OF_MNTP)
    study = Study(
        name=str(top.values.get("name", Path(place).stem)),
        backbones=_backbones(top),
        paradigms=top.choices("paradigms", PARADIGMS, PAPER_PARADIGMS),
        objectives=top.choices("objectives", OBJECTIVES),
        seeds=tuple(int(seed) for seed in top.numbers("seeds", [42], 0, whole=True)),
        label_noise=top.numbers("label_noise", [0.0], 0, 1),
        flops=budget.numbers("flops", [], 1),
        includes_mntp=budget.choice("includes_mntp", False, (True, False)),
        lengths=_lengths(budget),
        mntp=mntp,
        training=training,
        where=where,
        data={name: data.values[name] for name in ("train", "subset", "split", "queries", "documents")
              if data.values.get(name) is not None},
        hold_out=int(data.number("hold_out", 0, 0, whole=True)),
        overlap=data.choice("overlap", "refuse", ("refuse", "report")),
        tests=_tests(rating),
        dev=_dev(rating),
        metrics=_metrics(rating),
        top_k=int(rating.number("top_k", 100, 1, whole=True)),
        entropy_negatives=int(rating.number("entropy_negatives", 256, 1, whole=True)),
        engine=rating.choice("engine", "exact", ("exact", "torch", "seismic", "faiss")),
        dtype=rating.choice("dtype", "auto", ("auto", "float32", "bfloat16", "float16")),
        keep_weights=rating.choice("keep_weights", False, (True, False)),
        flops_per_second=_speed(top),
    )  # fmt: skip
    if (study.hold_out > 0) != any(test.source == HELD_OUT for test in study.tests):
        raise UsageError(
            f"{place}: data.hold_out is {study.hold_out} documents, and evaluation "
            f"{'lacks' if study.hold_out else 'has'} the test set {HELD_OUT!r} that they make: give both, or neither."
        )
    for paradigm in study.paradigms:
        try:
            engine_settings(study.engine, paradigm)
        except ValueError as error:
            raise UsageError(f"{rating.place}: {error}") from None
    if study.dev is not None and "hybrid" not in study.paradigms:
        raise UsageError(f"{rating.place}: dev is for the weights of hybrid models, and paradigms names none.")
    if mntp is not None and study.includes_mntp is False and "max_steps" not in mntp:
        raise UsageError(f"{place}: mntp needs max_steps, which is the same for all backbones.")
    return study


class _Section:
    """A mapping of the file: which keys it may have, and what their values may be."""

    def __init__(self, values: Any, place: str, needed: Sequence[str], optional: Sequence[str]) -> None:
        if not isinstance(values, Mapping):
            raise UsageError(f"{place} is {values!r}: give a mapping of {', '.join((*needed, *optional))}.")
        self.values, self.place = values, place
        require_known(values, (*needed, *optional), place)
        for name in needed:
            if values.get(name) is None:
                raise UsageError(f"{place} lacks {name!r}, which every study has: see training_scripts/studies.")

    def section(self, name: str, needed: Sequence[str], optional: Sequence[str]) -> _Section:
        return _Section(self.values.get(name) or {}, f"{self.place}: {name}", needed, optional)

    def list_of(self, name: str, default: Sequence[Any]) -> list[Any]:
        value = self.values.get(name, default)
        value = [value] if isinstance(value, str | float | int) and value is not default else value
        if not isinstance(value, list | tuple) or not value:
            raise UsageError(
                f"{self.place}: {name} is {value!r}: give a list of at least one, such as {list(default)}."
            )
        return list(value)

    def choices(self, name: str, allowed: Sequence[Any], default: Sequence[Any] | None = None) -> tuple[Any, ...]:
        found = self.list_of(name, allowed if default is None else default)
        for value in found:
            if value not in allowed:
                raise UsageError(f"{self.place}: {name} names {value!r}: choose from {', '.join(allowed)}.")
        return _once(found, f"{self.place}: {name}")

    def choice(self, name: str, default: Any, allowed: Sequence[Any]) -> Any:
        value = self.values.get(name, default)
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise UsageError(f"{self.place}: {name} is {value!r}: choose from {', '.join(map(str, allowed))}.")
        return value

    def number(self, name: str, default: float | None, least: float, whole: bool = False) -> float:
        return _number(self.values.get(name, default), f"{self.place}: {name}", least, math.inf, whole)

    def numbers(
        self, name: str, default: Sequence[float], least: float, most: float = math.inf, whole: bool = False
    ) -> tuple[float, ...]:
        found = [_number(value, f"{self.place}: {name}", least, most, whole) for value in self.list_of(name, default)]
        return _once(found, f"{self.place}: {name}")


def require_known(names: Collection[str], known: Collection[str], place: str) -> None:
    """Refuse keys that are not known."""
    for name in names:
        if name not in known:
            near = get_close_matches(str(name), list(known), 1, 0.6)
            remedy = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}."
            raise UsageError(f"{place} has {name!r}, which is not a setting of it: {remedy}")


def _once(found: list[Any], place: str) -> tuple[Any, ...]:
    if len(set(found)) < len(found):
        raise UsageError(f"{place} names one twice: {', '.join(map(str, found))}.")
    return tuple(found)


def _number(value: Any, place: str, least: float, most: float, whole: bool) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # 1e12, which YAML reads as text
    except (TypeError, ValueError):
        number = math.nan
    if not least <= number <= most or math.isinf(number) or (whole and number != int(number)):
        limits = f"of at least {least:g}" + ("" if math.isinf(most) else f" and at most {most:g}")
        raise UsageError(f"{place} is {value!r}: give a {'whole ' if whole else ''}number {limits}.")
    return number


def _backbones(top: _Section) -> tuple[BackboneChoice, ...]:
    found = []
    for number, values in enumerate(top.list_of("backbones", [{"recipe": "micro"}])):
        values = {"recipe": values} if isinstance(values, str) else values
        one = _Section(
            values, f"{top.place}: backbones[{number}]", ("recipe",), ("name", "model", "num_layers", "layers")
        )
        recipe = one.choice("recipe", None, tuple(BACKBONES))
        count, layers = one.values.get("num_layers"), one.values.get("layers")
        if count is not None and layers is not None:
            raise UsageError(f"{one.place} has num_layers and layers, which say the same thing: give one of them.")
        if count is not None:
            count = int(one.number("num_layers", None, 1, whole=True))
        if layers is not None:
            layers = tuple(int(layer) for layer in one.numbers("layers", [0], 0, whole=True))
        name = str(one.values.get("name", recipe))
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UsageError(f"{one.place}: name is {name!r}: it names a folder, of letters, digits, '-', '_' and '.'.")
        found.append(BackboneChoice(name, recipe, str(one.values.get("model", BACKBONES[recipe].model)), count, layers))
    _once([one.name for one in found], f"{top.place}: backbones")
    return tuple(found)


def _training(top: _Section) -> tuple[dict[str, Any], tuple[Condition, ...]]:
    options = _options(top, "training", "train", DECIDED)
    conditions = []
    for number, one in enumerate(options.pop("where", None) or []):
        place = f"{top.place}: training.where[{number}]"
        if not isinstance(one, Mapping):
            raise UsageError(f"{place} is {one!r}: give a mapping of paradigm, objective or backbone, and of options.")
        which = {name: one[name] for name in ("backbone", "paradigm", "objective") if name in one}
        allowed: dict[str, Sequence[str]] = {"paradigm": PARADIGMS, "objective": OBJECTIVES}
        allowed["backbone"] = tuple(choice.name for choice in _backbones(top))
        for name, value in which.items():
            if value not in allowed[name]:
                raise UsageError(f"{place}: {name} is {value!r}: choose from {', '.join(allowed[name])}.")
        own = {name: value for name, value in one.items() if name not in which}
        _refuse_decided(own, DECIDED, place)
        conditions.append(Condition(own, **which))
    return options, tuple(conditions)


def _options(top: _Section, name: str, command: str, decided: Sequence[str]) -> dict[str, Any]:
    values = {} if top.values.get(name) is None else top.values[name]
    if not isinstance(values, Mapping):
        raise UsageError(f"{top.place}: {name} is {values!r}: give a mapping of options of `lion-st {command}`.")
    _refuse_decided(values, decided, f"{top.place}: {name}")
    return dict(values)


def _refuse_decided(options: Mapping[str, Any], decided: Sequence[str], place: str) -> None:
    for name in options:
        if name in decided:
            raise UsageError(
                f"{place} has {name!r}, on which the study decides by its grid, budget and data: leave it out."
            )


def _lengths(budget: _Section) -> str | tuple[float, float]:
    value = budget.values.get("lengths", "measured")
    if isinstance(value, Mapping):
        means = budget.section("lengths", ("query", "document"), ())
        return means.number("query", None, 1), means.number("document", None, 1)
    return budget.choice("lengths", "measured", ("measured", "full"))


def _tests(rating: _Section) -> tuple[TestSet, ...]:
    found = []
    for domain in DOMAINS:
        for number, values in enumerate(rating.values.get(domain) or []):
            values = {"source": values} if isinstance(values, str) else values
            place = f"{rating.place}.{domain}[{number}]"
            one = _Section(values, place, ("source",), ("name", "split", "documents", "queries"))
            source = str(one.values["source"])
            if source == HELD_OUT and domain != "in_domain":
                raise UsageError(f"{place} is {HELD_OUT!r}, which is of the training data: it belongs to in_domain.")
            sizes = {size: int(one.number(size, None, 1, whole=True)) for size in ("documents", "queries")
                     if size in one.values}  # fmt: skip
            name = str(one.values.get("name", source.rstrip("/").replace(":", "/").rpartition("/")[2]))
            found.append(TestSet(name, source, domain, str(one.values.get("split", "test")), **sizes))
    if not found:
        raise UsageError(f"{rating.place} names no test set: list some under {' and '.join(DOMAINS)}.")
    _once([test.name for test in found], f"{rating.place} (a `name:` tells test sets apart)")
    return tuple(found)


def _dev(rating: _Section) -> tuple[str, str] | None:
    values = rating.values.get("dev")
    if values is None:
        return None
    one = _Section({"source": values} if isinstance(values, str) else values, f"{rating.place}.dev", ("source",),
                   ("split",))  # fmt: skip
    found = str(one.values["source"]), str(one.values.get("split", "dev"))
    if found[0] == HELD_OUT or found in [(test.source, test.split) for test in _tests(rating)]:
        raise UsageError(f"{one.place} is a test set of the study: fit on queries that no result is reported on.")
    return found


def _metrics(rating: _Section) -> tuple[str, ...]:
    from lion_st.evaluation.metrics import require_metrics

    metrics = rating.list_of("metrics", ["nDCG@10", "MRR@10", "Recall@100"])
    try:
        require_metrics(metrics, int(rating.number("top_k", 100, 1, whole=True)))
    except ValueError as error:
        raise UsageError(f"{rating.place}: {error}") from None
    return _once(metrics, f"{rating.place}: metrics")


def _speed(top: _Section) -> float:
    value = top.values.get("machine", "H100")
    if value in CARDS:
        return UTILISATION * CARDS[value]
    try:
        return _number(value, f"{top.place}: machine", 1e6, math.inf, False)
    except UsageError:
        raise UsageError(
            f"{top.place}: machine is {value!r}: give {' or '.join(CARDS)}, or the training FLOPs a second that it "
            "reaches, such as 5e10 for a core of a CPU."
        ) from None
