"""Options of a run from three layers: the recipe, a YAML file over it, the command line over both."""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, Action, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from lion_st.errors import UsageError

# Options that say the same thing in two ways: what a layer gives takes the place of the other in the layers below it.
RIVALS = (("max_steps", "num_train_epochs"), ("warmup_steps", "warmup_ratio"), ("bf16", "fp16"))
CHOICES = ("recipe", "backbone", "paradigm", "objective")  # decide on the recipe, and so on every other default
TRANSFORMERS_EPOCHS = 3.0  # its default, which is not read where max_steps is positive
HELP = ("-h", "--help", "--help_all", "--help-all")


def merge_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the layers, each over those before it.

    Where a layer has `num_train_epochs`, the `max_steps` of the layers before it go, and alike for all of `RIVALS`.

    Example:
        >>> merge_layers({"max_steps": 100, "seed": 1}, {"num_train_epochs": 2})
        {'seed': 1, 'num_train_epochs': 2}
    """
    values: dict[str, Any] = {}
    for layer in layers:
        given = {name for pair in RIVALS for name in pair if layer.get(name) not in (None, False)}
        for pair in RIVALS:
            if given.issuperset(pair):
                raise UsageError(f"--{pair[0]} and --{pair[1]} say the same thing in two ways: give one of them.")
            for name, rival in (pair, pair[::-1]):
                if name in given:
                    values.pop(rival, None)
        values |= layer
    return values


def resolve_steps(arguments: Any, max_steps: int) -> None:
    """Fill in the steps and epochs of training arguments: what was given, else `max_steps`."""
    if arguments.max_steps is None:
        arguments.max_steps = max_steps if arguments.num_train_epochs is None else -1
    if arguments.max_steps > 0 and arguments.num_train_epochs not in (None, TRANSFORMERS_EPOCHS):
        merge_layers({"max_steps": arguments.max_steps, "num_train_epochs": arguments.num_train_epochs})
    if arguments.num_train_epochs is None:
        arguments.num_train_epochs = TRANSFORMERS_EPOCHS


def read_config(path: str) -> dict[str, Any]:
    """Read a YAML file of options, or by its name one that comes with lion_st, such as "lion_sp_8b"."""
    folder = files("lion_st.training") / "configs"
    bundled = {Path(file.name).stem: file for file in folder.iterdir() if file.name.endswith(".yaml")}
    file = Path(path)
    if not file.is_file() and path not in bundled:
        there = "is a folder" if file.is_dir() else "is not there"
        raise FileNotFoundError(f"The file {path!r} of --config {there}. lion_st brings {', '.join(sorted(bundled))}.")
    text = (file if file.is_file() else bundled[path]).read_text(encoding="utf-8-sig")
    values = read_yaml(text, path)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"{path} is not a list of `option: value` lines.")
    return {name.removeprefix("--").replace("-", "_"): value for name, value in values.items()}


def read_yaml(text: str, name: str | Path) -> Any:
    """What YAML says; `name` is what errors begin with."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not YAML: {' '.join(str(error).split())}") from None


def split_config(options: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take `--config FILE` or `--config=FILE` out of a command line."""
    rest, config = [], None
    words = iter(options)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        if config is not None:
            raise UsageError("--config is given twice: one file holds all options.")
        config = value if equals else next(words, "")
        if not config or config.startswith("--"):
            raise UsageError("--config takes a YAML file.")
    return config, rest


def chosen(options: Sequence[str]) -> dict[str, str]:
    """Backbone, paradigm and objective that a command line and its YAML file name; cheap, as it imports no torch.

    Raises:
        FileNotFoundError: If there is no such YAML file.
        UsageError: If it cannot be read.
    """
    config, rest = split_config(options)
    values = read_config(config) if config is not None else {}
    for place, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name.removeprefix("--") in CHOICES and name.startswith("--"):
            values[name[2:]] = value if equals else "".join(rest[place + 1 : place + 2])
    return {name: str(values[name]) for name in CHOICES if values.get(name) is not None}


class OptionsReader:
    """Reads dataclasses from a command line and a YAML file, and knows what was given and what is a default.

    Args:
        kinds: The dataclasses, whose fields are the options; the first is the program's own.
        program: What is typed in front of the options.
        description: First lines of the help.
        shown: Fields of the other dataclasses that `--help` shows, `--help_all` showing all of them, with what to say
            in place of the field's own help, if anything.
        unread: Fields that are refused, and not shown.
    """

    def __init__(
        self,
        kinds: Sequence[type],
        program: str,
        description: str,
        shown: Mapping[str, str | None] = MappingProxyType({}),
        unread: Collection[str] = (),
    ) -> None:
        from transformers import HfArgumentParser

        class Parser(HfArgumentParser):
            def error(self, message: str) -> NoReturn:
                raise UsageError(_one_option(message))

        assert all(map(is_dataclass, kinds))
        self.kinds = kinds
        self.shown = {*shown, *(item.name for item in fields(kinds[0]))}
        self.parser = Parser(
            list(kinds),  # type: ignore[arg-type]
            prog=program,
            usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
            description=description,
            epilog="--config FILE reads options from YAML, `option: value` a line; the command line comes before it. "
            "--help_all lists every option. LION_ST_TRACEBACK=1 shows where an error comes from.",
            allow_abbrev=False,
        )
        for action in self.parser._actions:
            action.help = shown.get(action.dest) or action.help
            if _denies(action):  # transformers' parser says the opposite
                action.help = f"Not --{action.dest}."
            if action.dest in unread:
                action.help = SUPPRESS

    def read(
        self, options: Sequence[str] | None, defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> tuple[Any, ...]:
        """The dataclasses of a command line.

        Args:
            options: In place of `sys.argv`.
            defaults: Makes the lowest layer, such as a recipe's values, of what was given.

        Raises:
            FileNotFoundError: If there is no such YAML file.
            UsageError: If an option is unknown, which is the nearest; or a value is wrong.
            SystemExit: After the help, if it was asked for.
        """
        config, words = split_config(sys.argv[1:] if options is None else options)
        from_file = self._typed(read_config(config), config) if config is not None else {}
        if not set(HELP).isdisjoint(words):
            self._print_help(words, from_file, defaults)
        from_line = self._parse(words)
        given = merge_layers(from_file, from_line)
        values = merge_layers(defaults(given), given)
        made = []
        for kind in self.kinds:
            names = {item.name for item in fields(kind) if item.init}
            made.append(kind(**{name: value for name, value in values.items() if name in names}))
        return (*made, frozenset(given))

    def _parse(self, words: Sequence[str]) -> dict[str, Any]:
        """What a command line gives, without defaults."""
        kept = [(action, action.default) for action in self.parser._actions]
        try:
            for action, _ in kept:
                action.default = SUPPRESS
            namespace, unknown = self.parser.parse_known_args(list(words), Namespace())
        finally:
            for action, default in kept:
                action.default = default
        if unknown:
            raise UsageError(self._unknown(unknown[0], "this command"))
        return vars(namespace)

    def _typed(self, values: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Values of a YAML file as the command line would read them: 1e-4, which is text in YAML, becomes a number."""
        actions = {action.dest: action for action in reversed(self.parser._actions)}
        typed = {}
        for name, value in values.items():
            if name not in actions or name == "help":
                raise UsageError(self._unknown(f"--{name}", source))
            typed[name] = _typed_value(actions[name], value, source)
        return typed

    def _unknown(self, word: str, source: str) -> str:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"{word!r} is not an option of {source}: options begin with --."
        names = [f"--{item.name}" for kind in self.kinds for item in fields(kind) if item.init]
        near = get_close_matches(name.replace("-", "_").replace("__", "--", 1), names, 1, 0.6)
        return f"{name} is not an option of {source}" + (f": did you mean {near[0]}?" if near else "; see --help.")

    def _print_help(
        self, words: Sequence[str], from_file: Mapping[str, Any], defaults: Callable[[Mapping[str, Any]], Any]
    ) -> NoReturn:
        """Print the options, with the defaults of the recipe that is named beside `--help`, if one is."""
        named = chosen([word for word in words if word not in HELP])
        try:
            values = merge_layers(defaults({**from_file, **named}), from_file, named)
        except ValueError:
            values = {}
        for action in self.parser._actions:
            action.default = values.get(action.dest, action.default)
            if _denies(action) or action.default in (None, "", [], -1):
                action.default = SUPPRESS
            if action.dest not in self.shown | {"help"} and "_all" not in "".join(words).replace("-", "_"):
                action.help = SUPPRESS
        self.parser.print_help()
        raise SystemExit(0)


def _denies(action: Action) -> bool:
    return action.option_strings[0].startswith("--no_")


def _typed_value(action: Action, value: Any, source: str) -> Any:
    wrong = f"{source} gives --{action.dest} the value {value!r}"
    if action.nargs == "+":
        return [_typed_item(action, item, wrong) for item in (value if isinstance(value, list) else [value])]
    return _typed_item(action, value, wrong)


def _typed_item(action: Action, value: Any, wrong: str) -> Any:
    convert: Any = action.type or str
    is_flag = getattr(convert, "__name__", "") == "string_to_bool"
    if value is None or isinstance(value, bool if is_flag else dict if convert is str else ()):
        return value
    if value is False and "no" in (action.choices or ()):  # as YAML reads a bare no
        return "no"
    if isinstance(value, list | dict):
        raise UsageError(f"{wrong}, where one value belongs.")
    try:
        converted = convert(str(value))
    except (ValueError, TypeError, ArgumentTypeError) as error:
        kind = getattr(convert, "__name__", "value")
        expected = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}.get(kind)
        raise UsageError(f"{wrong}, which is not {expected}." if expected else f"{wrong}: {error}") from None
    if action.choices is not None and converted not in action.choices:
        raise UsageError(f"{wrong}; choose from {', '.join(map(str, action.choices))}.")
    return converted


def _one_option(message: str) -> str:
    """argparse's message with one spelling of the option."""
    return re.sub(r"argument (--\w+)(/--[\w-]+)*: ", r"\1: ", message)
