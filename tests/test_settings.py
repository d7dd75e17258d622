"""Settings: JSON is read strictly, every field's comment is found.

    pytest tests/test_settings.py
"""
from dataclasses import asdict, dataclass

import pytest

from ops.errors import InputError
from ops.settings import LIMITS, checked, comments, from_dict, leaves, with_leaves
from pretraining.settings import Settings as Pretraining
from tasks.recipes import ROWS


@dataclass(frozen=True)
class Base:
    """A settings class that another one is based on."""

    first: int = 1  # of the base: "quoted", with # inside
    plain: str = "x#y"


@dataclass(frozen=True)
class Inner:
    """A settings class within another one."""

    sides: tuple[int, int] | None = None  # height and width
    widths: tuple[int, ...] = (1, 2)  # any number


@dataclass(frozen=True)
class Outer(Base):
    """Every kind of field."""

    first: int = 2  # another comment
    rate: float = 0.5  # a rate
    on: bool = False  # a switch
    name: str | None = None  # a name
    inner: Inner = Inner()  # more

    def method(self):
        local: int = 3  # no field
        return local


GOOD = {"first": 3, "plain": "z", "rate": 2, "on": True, "name": None,
        "inner": {"sides": [3, 4], "widths": []}}


def test_json_becomes_the_settings():
    """Lists become tuples, objects the settings within; null where it may be; an int is a float."""
    made = from_dict(Outer, GOOD, "f.json")
    assert made == Outer(3, "z", 2, True, None, Inner((3, 4), ()))
    assert from_dict(Outer, asdict(made), "f.json") == made


@pytest.mark.parametrize("change, message", [
    ({"lr": 1}, "f.json: unknown field 'lr'; known: first, plain, rate, on, name, inner"),
    ({"rate": float("nan")}, "f.json: rate is nan, but should be a finite number"),
    ({"rate": float("inf")}, "rate is inf"), ({"rate": "0.5"}, "rate is '0.5'"),
    ({"first": True}, "first is True, but should be an integer"),
    ({"rate": False}, "rate is False"), ({"first": 3.0}, "first is 3.0"),
    ({"on": 1}, "on is 1, but should be true or false"),
    ({"name": 3}, "name is 3, but should be a text or null"), ({"plain": None}, "plain is None"),
    ({"inner": 3}, "f.json: inner must be an object with the fields of Inner"),
    ({"inner": {"widths": [1]}}, "f.json: inner lacks the field sides"),
    ({"inner": {"sides": [1, 2, 3], "widths": []}},
     "inner: sides is [1, 2, 3], but should be a list of 2 (an integer) or null"),
    ({"inner": {"sides": None, "widths": [True]}}, "widths is [True], but should be a list of (an"),
    ({"inner": {"sides": None, "widths": "12"}}, "widths is '12'")])
def test_wrong_values_are_refused_in_one_line(change, message):
    """Unknown, of another type, not finite, a bool for a number: file, field and what is right."""
    with pytest.raises(InputError) as error:
        from_dict(Outer, {**GOOD, **change}, "f.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_fields_and_other_json_are_refused():
    """No default fills a gap; a list is no object of settings."""
    with pytest.raises(InputError, match="^f.json lacks the field rate$"):
        from_dict(Outer, {name: value for name, value in GOOD.items() if name != "rate"}, "f.json")
    with pytest.raises(InputError, match="^f.json must be an object with the fields of Outer$"):
        from_dict(Outer, [GOOD], "f.json")


def test_comments_are_found():
    """Of every field, those of base classes too, of which the later wins; none is an empty text."""
    assert comments(Outer) == {"first": "another comment", "plain": "", "rate": "a rate",
                               "on": "a switch", "name": "a name", "inner": "more"}
    assert comments(Base)["first"] == 'of the base: "quoted", with # inside'


def test_leaves_are_reached_and_changed_by_their_paths():
    """A leaf is any field that is no settings class; several are changed together."""
    outer = Outer()
    assert leaves(outer) == {("first",): 2, ("plain",): "x#y", ("rate",): 0.5, ("on",): False,
                             ("name",): None, ("inner", "sides"): None,
                             ("inner", "widths"): (1, 2)}
    changed = with_leaves(outer, {("rate",): 1.0, ("inner", "sides"): (1, 1),
                                  ("inner", "widths"): ()})
    assert changed == Outer(rate=1.0, inner=Inner((1, 1), ())) and outer == Outer()


# ------------------------------------------------------------------------------------------------
# Limits

@pytest.mark.parametrize("hint, name, good, bad, message", [
    (int, "at_once", 1, 0, "possible is 1 to 65536"), (float, "dropout", 0.0, 1.0, "0 to 0.99"),
    (tuple[int, ...], "channels", (1, 65536), (32, 0), "1 to 65536"),
    (str, "schedule", "step", "cosine", "possible are poly, two-phase, step, power"),
    (str | None, "box", None, "all", "possible are nyu, garg, eigen")])
def test_values_out_of_their_limits_are_refused(hint, name, good, bad, message):
    """By the setting's name, in whichever class; null where it may be."""
    assert checked(hint, good, "--x", name) == good
    with pytest.raises(InputError, match=f"^--x is .*, .*{message}$"):
        checked(hint, bad, "--x", name)


def test_every_number_has_limits():
    """Those of all rows, and no limit is left of a setting that is gone."""
    names = {path[-1]: value for rows in ROWS.values() for row in rows.values()
             for path, value in leaves(row).items()}
    numbers = {name for name, value in names.items()
               if isinstance(value, (int, float)) and not isinstance(value, bool)}
    assert numbers <= LIMITS.keys()
    other = {"step", "evaluated", "seeds"}               # of state.json and tools/ablate.py
    assert LIMITS.keys() - names.keys() <= other | Pretraining.__dataclass_fields__.keys()
