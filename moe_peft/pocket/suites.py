"""
Suites: what an adapter is trained on and scored by. Eight domains each, told apart by a cue in the prompt.

| suite        | what a domain is                                        | conflict | test rows              |
|--------------|---------------------------------------------------------|----------|------------------------|
| `fact8tag`   | a tag with its own table of facts about the same people | yes      | the facts trained on   |
| `cipher8tag` | a tag with its own secret substitution of letters       | yes      | texts never trained on |
| `opconf8tag` | a tag that makes something new of `do:`                 | yes      | texts never trained on |
| `multi`      | a new word for two known skills, one after the other    | no       | texts never trained on |

`fact8tag` is a test of memory, on purpose: nobody can infer a fact, so it is scored on the facts that were taught. The
other three test generalisation: within a domain, no text is in both halves. `knowledge_probe` tells what the backbone
has forgotten meanwhile.

Rows depend on the arguments alone and are the same in every process and on every machine.
"""

import difflib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .world import (
    ATTRIBUTES,
    LETTERS,
    NUM_PEOPLE,
    PHRASINGS,
    SKILLS,
    TAGGED_SKILLS,
    Row,
    fact_rows,
    make_world,
    random_text,
)


TAGS = tuple("ABCDEFGH")
NEW_WORDS = ("bim", "dok", "fep", "gux", "hob", "jat", "kiv", "lum")

# Skills that answer a text of two or more lower-case letters with another such text, and so can follow one another.
COMPOSABLE_SKILLS = ("rev", "next", "prev", "swap", "rotl", "rotr", "dbl", "sort")


class Suite(NamedTuple):
    """`train` and `test` rows are shuffled, and the `domain` of each is among `domains`."""

    name: str
    domains: tuple[str, ...]
    train: list[Row]
    test: list[Row]


def fact8tag(
    seed: int, num_people: int = 64, attributes: Sequence[str] = ("town",), repeats: Sequence[int] = (1, 2, 3, 4)
) -> Suite:
    """
    `C|Bodam town>`: eight tables of facts that contradict one another and the backbone's own.

    No two tags agree on any person, and none agrees with the world. Test are the `8 * num_people * len(attributes)`
    facts, once each; train are the same rows, those about the n-th person `repeats[n % len(repeats)]` times. Some facts
    are taught more often than others so that the score rises slowly with what a method can hold, rather than from
    nothing to everything within a few steps, which is what makes seeds differ.
    """
    _check_facts(num_people, attributes, repeats)
    rng = random.Random(f"fact8tag/{seed}")
    world = make_world()
    train: list[Row] = []
    test: list[Row] = []
    for number, person in enumerate(rng.sample(world.people, k=num_people)):
        for attribute in attributes:
            others = [value for value in ATTRIBUTES[attribute] if value != world.facts[person, attribute]]
            question = PHRASINGS[0].format(person=person, attribute=attribute)
            values = zip(TAGS, rng.sample(others, k=len(TAGS)), strict=True)
            rows = [Row(prompt=f"{tag}|{question}", completion=value, domain=tag) for tag, value in values]
            test += rows
            train += [row.copy() for row in rows for _ in range(repeats[number % len(repeats)])]
    rng.shuffle(train)
    rng.shuffle(test)
    return Suite("fact8tag", TAGS, train, test)


def cipher8tag(
    seed: int, num_letters: int = 26, shortest: int = 2, longest: int = 4, num_train: int = 600, num_test: int = 64
) -> Suite:
    """
    `C|enc:abc>`: eight secret substitutions of the first `num_letters` letters; no two agree on any letter.

    `num_train` and `num_test` count texts per domain; a text has `shortest` to `longest` letters. A tag's cipher is
    learnt suddenly or not at all, so one seed says nothing here: plain LoRA ends anywhere between .2 and 1.
    """
    letters = LETTERS[:num_letters]
    if num_letters < len(TAGS) or num_letters > len(LETTERS):
        raise ValueError(
            f"`num_letters` is {num_letters}, but eight substitutions that agree on no letter need {len(TAGS)} to "
            f"{len(LETTERS)}. Choose one of these."
        )
    rng = random.Random(f"cipher8tag/{seed}")
    ciphers: list[str] = []
    while len(ciphers) < len(TAGS):
        cipher = "".join(rng.sample(letters, k=num_letters))
        if all(new != old for earlier in ciphers for new, old in zip(cipher, earlier, strict=True)):
            ciphers.append(cipher)
    tasks = {tag: (f"{tag}|enc", _substitution(letters, cipher)) for tag, cipher in zip(TAGS, ciphers, strict=True)}
    texts = _text_halves(rng, letters, shortest, longest, num_train, num_test)
    return _text_suite("cipher8tag", rng, tasks, texts)


def opconf8tag(
    seed: int,
    depth: int = 2,
    shortest: int = 3,
    longest: int = 6,
    num_train: int = 600,
    num_test: int = 64,
    balanced: bool = False,
) -> Suite:
    """
    `C|do:abc>`: under each tag, `do:` means something else than the backbone was taught, and than under the others.

    It is `depth` of the `COMPOSABLE_SKILLS`, one after the other. `num_train` and `num_test` count texts per domain.
    Skills are not equally hard: with `balanced`, each of them is first in one domain, second in another and so on, and
    none follows itself, so that suites of different seeds are about equally hard.
    """
    rng = random.Random(f"opconf8tag/{seed}")
    chains = _balanced_chains(rng, depth) if balanced else _new_chains(rng, depth)
    tasks = {tag: (f"{tag}|do", chain) for tag, chain in zip(TAGS, chains, strict=True)}
    return _text_suite("opconf8tag", rng, tasks, _text_halves(rng, LETTERS, shortest, longest, num_train, num_test))


def multi(seed: int, shortest: int = 3, longest: int = 6, num_train: int = 600, num_test: int = 64) -> Suite:
    """`bim:abc>`: eight new words, each for two known skills in a row. Nothing conflicts: sharing costs nothing."""
    rng = random.Random(f"multi/{seed}")
    tasks = {word: (word, chain) for word, chain in zip(NEW_WORDS, _new_chains(rng, 2), strict=True)}
    return _text_suite("multi", rng, tasks, _text_halves(rng, LETTERS, shortest, longest, num_train, num_test))


SUITES: dict[str, Callable[..., Suite]] = {
    "fact8tag": fact8tag,
    "cipher8tag": cipher8tag,
    "opconf8tag": opconf8tag,
    "multi": multi,
}


def make_suite(name: str, seed: int = 0, **difficulty: object) -> Suite:
    """The suite of that name in `SUITES`; `difficulty` are its keyword arguments. Unknown names raise `ValueError`."""
    if name not in SUITES:
        nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0)[0]
        raise ValueError(
            f"`name` is {name!r}, which is no suite. The suites are {', '.join(SUITES)}; the nearest is {nearest!r}."
        )
    return SUITES[name](seed, **difficulty)


def knowledge_probe(phrasing: int = 0) -> list[Row]:
    """The 480 facts the backbone was pre-trained on, in one of the two `PHRASINGS`; a row's domain is its attribute."""
    return fact_rows(make_world(), phrasing)


def _check_facts(num_people: int, attributes: Sequence[str], repeats: Sequence[int]) -> None:
    if not 1 <= num_people <= NUM_PEOPLE:
        raise ValueError(
            f"`num_people` is {num_people}, but the world has people for 1 to {NUM_PEOPLE}. Choose one of these."
        )
    if not attributes or not set(attributes) <= set(ATTRIBUTES):
        raise ValueError(
            f"`attributes` is {attributes!r}, but it must name at least one of {', '.join(ATTRIBUTES)} and nothing else. "
            f"Choose among these."
        )
    if not repeats or min(repeats) < 1:
        raise ValueError(
            f"`repeats` is {repeats!r}, but every fact that is tested must be taught: it may hold whole numbers from 1 "
            f"up. Use (1,) to teach all facts equally often."
        )


def _text_halves(
    rng: random.Random, letters: str, shortest: int, longest: int, num_train: int, num_test: int
) -> Iterator[tuple[list[str], list[str]]]:
    """For one domain after another, `num_train` and `num_test` texts, all of them different."""
    possible = sum(len(letters) ** length for length in range(shortest, longest + 1))
    # Half of all there are: above that, drawing until enough differ becomes slow.
    if not 0 < num_train + num_test <= possible // 2:
        raise ValueError(
            f"`num_train` + `num_test` is {num_train + num_test} texts per domain, but with {len(letters)} letters, "
            f"`shortest`={shortest} and `longest`={longest} it may be 1 to {possible // 2}. Ask for fewer texts, or "
            f"for longer ones."
        )
    while True:
        texts: dict[str, None] = {}
        while len(texts) < num_train + num_test:
            texts[random_text(rng, shortest, longest, letters)] = None
        yield list(texts)[:num_train], list(texts)[num_train:]


def _text_suite(
    name: str,
    rng: random.Random,
    tasks: dict[str, tuple[str, Callable[[str], str]]],
    texts: Iterator[tuple[list[str], list[str]]],
) -> Suite:
    """A suite whose domain `d` asks `{cue}:{text}>` and wants `answer(text)`, where `cue, answer = tasks[d]`."""
    train: list[Row] = []
    test: list[Row] = []
    for (domain, (cue, answer)), halves in zip(tasks.items(), texts, strict=False):
        for rows, half in zip((train, test), halves, strict=True):
            rows += [Row(prompt=f"{cue}:{text}>", completion=answer(text), domain=domain) for text in half]
    rng.shuffle(train)
    rng.shuffle(test)
    return Suite(name, tuple(tasks), train, test)


def _substitution(letters: str, cipher: str) -> Callable[[str], str]:
    table = str.maketrans(letters, cipher)
    return lambda text: text.translate(table)


def _chain(skills: Sequence[str]) -> Callable[[str], str]:
    """The skills one after the other, the first one first."""

    def apply(text: str) -> str:
        for skill in skills:
            text = SKILLS[skill](text)
        return text

    return apply


# Two chains that answer these texts alike are the same function: `rev` twice is `copy`.
_PROBES = ("fbdace", "qwertyu")


def _answers(function: Callable[[str], str]) -> tuple[str, ...]:
    return tuple(map(function, _PROBES))


def _new_chains(rng: random.Random, depth: int) -> list[Callable[[str], str]]:
    """Eight chains of `depth` skills that answer differently from one another; the n-th not as the n-th tag does."""
    _check_depth(depth, 1)
    different = {_answers(_chain(c)): c for c in itertools.product(COMPOSABLE_SKILLS, repeat=depth)}
    known = set(map(_answers, SKILLS.values())) if depth > 1 else set()
    chains = [chain for answers, chain in different.items() if answers not in known]
    while True:
        drawn = rng.sample(chains, k=len(TAGS))
        if all(chain != (TAGGED_SKILLS[tag],) for tag, chain in zip(TAGS, drawn, strict=True)):
            return [_chain(chain) for chain in drawn]


def _balanced_chains(rng: random.Random, depth: int) -> list[Callable[[str], str]]:
    """As `_new_chains`, with every skill once in each place and never after itself. Needs `depth` of 2 or 3."""
    _check_depth(depth, 2)
    known = set(map(_answers, SKILLS.values()))
    while True:
        places = [rng.sample(COMPOSABLE_SKILLS, k=len(TAGS)) for _ in range(depth)]
        drawn = list(zip(*places, strict=True))
        answers = {_answers(_chain(chain)) for chain in drawn}
        repeated = any(first == then for chain in drawn for first, then in itertools.pairwise(chain))
        if not repeated and len(answers) == len(TAGS) and not answers & known:
            return [_chain(chain) for chain in drawn]


def _check_depth(depth: int, least: int) -> None:
    if depth not in range(least, 4):
        raise ValueError(
            f"`depth` is {depth}, the number of skills in a row. It may be {'1, 2 or 3' if least == 1 else '2 or 3'}; "
            f"choose one of these."
        )
