"""Values that people write down, in options and in environment variables: what they are, and whether they are right."""

from __future__ import annotations

from pyint8.errors import OptionError


def require_int(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    """Raises OptionError unless an option is an integer from `low` to `high`, or None where that is `optional`."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name} is {value!r}; it must be an integer from {low} to {high}")


def require_gpus(name: str, value: object, most: int) -> None:
    """Raises OptionError unless an option is a tuple of the numbers of `most` different GPUs at most."""
    numbers = value if isinstance(value, tuple) else (None,)
    if len(numbers) > most or len(set(numbers)) < len(numbers) or not all(type(n) is int and n >= 0 for n in numbers):
        raise OptionError(f"{name} is {value!r}; it must be a tuple of numbers of GPUs, each once, {most} at most")


def parse(variable: str, text: str, kind: type) -> object:
    """What an environment variable says: a `str`, `bool`, `int`, or a `tuple` of integers with commas between them.

    Raises:
        OptionError: It cannot be read as that.
    """
    if kind is str:
        return text
    if kind is bool:
        choices = {"0": False, "false": False, "1": True, "true": True}
        if text.lower() not in choices:
            raise OptionError(f"environment variable {variable} is {text!r}; it must be 0 or 1")
        return choices[text.lower()]
    try:
        return tuple(map(int, text.split(","))) if kind is tuple else int(text)
    except ValueError:
        wanted = "integers with commas between them" if kind is tuple else "an integer"
        raise OptionError(f"environment variable {variable} is {text!r}; it must be {wanted}") from None
