"""
The little world the pocket backbone knows: 160 invented people, a page of string skills, small arithmetic.

Everything the backbone has ever read comes from here, generated from a seed in plain Python, so an experiment can say
exactly what was known before an adapter was trained. A document is one question and its answer, `prompt + completion`,
in one line and at most about 40 characters:

    Bodam town>Lirsek        a fact (also asked as `town of Bodam>`)
    rev:abcde>edcba          a skill named by its prefix
    C|do:abcde>...           a skill named by the leading tag alone
    17+5>22   cnt a:banana>3   max:7,31,12>31
    k=p c=x f=b;cf>xb        a mapping given in the prompt

The module knows no tokens and no tensors: it hands out strings.
"""

import random
from collections.abc import Callable
from typing import NamedTuple, TypedDict


class Row(TypedDict):
    """One question. `prompt` and `completion` are TRL's prompt-completion format; neither holds an end-of-text."""

    prompt: str
    completion: str
    domain: str


class World(NamedTuple):
    """`people` in the order they were invented, and `facts[person, attribute] -> value` for all 480 pairs."""

    people: tuple[str, ...]
    facts: dict[tuple[str, str], str]


LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_PEOPLE = 160
TOWNS = tuple(
    "Ardon Belmis Corva Dunleth Elsin Farrow Gostal Hembry Irlan Jostad Kelvar Lirsek "
    "Mordin Nesbo Orvik Pelham Quarn Rostel Selby Torvin Umbria Velden Wexley Yarrow".split()
)
JOBS = tuple(
    "actor baker clerk diver farmer guard hunter judge knight lawyer mason nurse "
    "pilot poet ranger sailor scout singer smith tailor tutor vicar weaver writer".split()
)
PETS = tuple(
    "ape bat bear cat cow crab dog duck eel fox frog goat "
    "hare hen lamb mole newt owl pig rat seal toad wolf yak".split()
)
ATTRIBUTES = {"town": TOWNS, "job": JOBS, "pet": PETS}
PHRASINGS = ("{person} {attribute}>", "{attribute} of {person}>")


def _each(function: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: "".join(map(function, text))


def _shift(by: int) -> Callable[[str], str]:
    return _each(lambda letter: LETTERS[(LETTERS.index(letter) + by) % 26])


def _swap_pairs(text: str) -> str:
    """`abcde` -> `badce`: neighbours change places, an odd last letter stays."""
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


# A skill maps a string of lower-case letters to its answer.
SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "rev": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
    "next": _shift(1),
    "prev": _shift(-1),
    "swap": _swap_pairs,
    "rotl": lambda text: text[1:] + text[:1],
    "rotr": lambda text: text[-1:] + text[:-1],
    "upper": str.upper,
    "dbl": _each(lambda letter: letter * 2),
    "first": lambda text: text[0],
    "last": lambda text: text[-1],
    "odd": lambda text: text[0::2],
    "even": lambda text: text[1::2],
    "len": lambda text: str(len(text)),
    "top": max,
}

# What a leading tag makes of `do:`. Which tag means which skill is arbitrary and fixed: the backbone has learnt it.
TAGGED_SKILLS = {
    "A": "rev", "B": "next", "C": "swap", "D": "upper", "E": "rotl", "F": "dbl",
    "G": "odd", "H": "copy", "I": "prev", "J": "even", "K": "rotr", "L": "last",
}  # fmt: skip


def make_world(seed: int = 0) -> World:
    """Invent the people and deal every one of them a town, a job and a pet."""
    rng = random.Random(f"world/{seed}")
    names: set[str] = set()
    while len(names) < NUM_PEOPLE:
        onset, middle, coda = (rng.choice("bdfgklmnprstvz") for _ in range(3))
        names.add(f"{onset}{rng.choice('aeiou')}{middle}{rng.choice('aeiou')}{coda}".capitalize())
    people = sorted(names)
    rng.shuffle(people)
    facts = {(person, attribute): rng.choice(values) for person in people for attribute, values in ATTRIBUTES.items()}
    return World(tuple(people), facts)


def fact_rows(world: World, phrasing: int = 0) -> list[Row]:
    """The 480 facts in one of the two `PHRASINGS`; the domain of a row is its attribute."""
    return [
        Row(prompt=PHRASINGS[phrasing].format(person=p, attribute=a), completion=value, domain=a)
        for (p, a), value in world.facts.items()
    ]


def random_text(rng: random.Random, shortest: int = 2, longest: int = 7, letters: str = LETTERS) -> str:
    """Some of the letters, each drawn alone; the length is uniform between the two ends, both included."""
    return "".join(rng.choices(letters, k=rng.randint(shortest, longest)))


def skill_row(rng: random.Random, skill: str, prefix: str | None = None) -> Row:
    """One use of a skill on a random text. `prefix` replaces the skill's own name in front of the colon."""
    text = random_text(rng)
    return Row(prompt=f"{prefix or skill}:{text}>", completion=SKILLS[skill](text), domain=skill)


def tagged_row(rng: random.Random, tag: str) -> Row:
    """The skill `TAGGED_SKILLS[tag]`, asked for by its tag: `C|do:abcd>badc`."""
    return {**skill_row(rng, TAGGED_SKILLS[tag], f"{tag}|do"), "domain": f"tag {tag}"}


def _add(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    return f"{a}+{b}", a + b


def _subtract(rng: random.Random) -> tuple[str, int]:
    b, a = sorted((rng.randint(0, 30), rng.randint(0, 30)))
    return f"{a}-{b}", a - b


def _multiply(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return f"{a}*{b}", a * b


def _modulo(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(0, 30), rng.randint(2, 9)
    return f"{a}%{b}", a % b


def _count(rng: random.Random) -> tuple[str, int]:
    letters = rng.sample(LETTERS, k=2)
    text = "".join(rng.choices(letters, k=rng.randint(3, 7)))
    return f"cnt {letters[0]}:{text}", text.count(letters[0])


def _maximum(rng: random.Random) -> tuple[str, int]:
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(2, 3))]
    return "max:" + ",".join(map(str, numbers)), max(numbers)


SUMS: dict[str, Callable[[random.Random], tuple[str, int]]] = {
    "add": _add, "subtract": _subtract, "multiply": _multiply, "modulo": _modulo, "count": _count, "maximum": _maximum,
}  # fmt: skip


def sum_row(rng: random.Random, kind: str) -> Row:
    """One small calculation of the given kind in `SUMS`."""
    question, answer = SUMS[kind](rng)
    return Row(prompt=f"{question}>", completion=str(answer), domain=kind)


def lookup_row(rng: random.Random) -> Row:
    """A mapping told in the prompt and used at once: `k=p c=x f=b;cf>xb`. Nothing here can be known beforehand."""
    keys = rng.sample(LETTERS, k=rng.randint(2, 4))
    mapping = {key: rng.choice(LETTERS) for key in keys}
    asked = rng.choices(keys, k=rng.randint(1, 3))
    table = " ".join(f"{key}={value}" for key, value in mapping.items())
    return Row(prompt=f"{table};{''.join(asked)}>", completion="".join(mapping[key] for key in asked), domain="lookup")


def random_row(world: World, rng: random.Random) -> Row:
    """One document of the pre-training mixture: facts .27, skills .35, tagged skills .20, sums .12, lookups .06."""
    dice = rng.random()
    if dice < 0.27:
        (person, attribute), value = rng.choice(list(world.facts.items()))
        prompt = rng.choice(PHRASINGS).format(person=person, attribute=attribute)
        return Row(prompt=prompt, completion=value, domain=attribute)
    if dice < 0.62:
        # Sorting is learnt last; reading it three times as often as each of the others brings it along.
        return skill_row(rng, rng.choice([*SKILLS, "sort", "sort"]))
    if dice < 0.82:
        return tagged_row(rng, rng.choice(list(TAGGED_SKILLS)))
    return sum_row(rng, rng.choice(list(SUMS))) if dice < 0.94 else lookup_row(rng)
