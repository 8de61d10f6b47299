"""The questions of `eval/composite.py`: about one tag, about ten at once, and those that teach a backbone their form."""

import random
from typing import Any


TAGS = "ABCDEFGHIJ"
SKILLS = "rev next prev swap rotl rotr copy upper dbl odd even first last".split()


def meanings(seed: int) -> dict[str, str]:
    """What each tag means from now on: ten different skills, none of which it meant before."""
    from moe_peft.pocket.world import TAGGED_SKILLS

    rng = random.Random(f"composite/{seed}")
    while True:
        drawn = dict(zip(TAGS, rng.sample(SKILLS, k=len(TAGS)), strict=True))
        if all(skill != TAGGED_SKILLS[tag] for tag, skill in drawn.items()):
            return drawn


def composite(rng: random.Random, tags: str, means: dict[str, str]) -> dict[str, str]:
    """One question about all of these neighbouring tags, and an answer with a line for each."""
    from moe_peft.pocket.world import SKILLS as FUNCTIONS
    from moe_peft.pocket.world import random_text

    text = random_text(rng, 3, 4)
    lines = [f"{tag}|do:{text}>{FUNCTIONS[means[tag]](text)}\n" for tag in tags]
    return {"prompt": f"{tags[0]}-{tags[-1]}|do:{text};", "completion": "".join(lines), "domain": tags}


def single(rng: random.Random, tag: str, means: dict[str, str]) -> dict[str, Any]:
    """A question about one tag alone. Its answer is a line that more could follow: no end of the text is taught."""
    return {**composite(rng, tag, means), "goes_on": True}


def form_rows(count: int) -> list[Any]:
    """What teaches the backbone the form: whole composites, shorter ones, and a fifth of what it was pre-trained on.

    In half of the composites the answers are by any skills at all. Without them the backbone tells the next line's tag from
    the answers before it, and loses its place as soon as a tag means something else.
    """
    from moe_peft.pocket.world import TAGGED_SKILLS, make_world, random_row

    rng, world, rows = random.Random("composite/form"), make_world(), []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.8:
            number = len(TAGS) if kind < 0.6 else rng.randint(1, len(TAGS))
            first = rng.randint(0, len(TAGS) - number)
            means = dict(TAGGED_SKILLS)
            if rng.random() < 0.5:
                means |= {tag: rng.choice(SKILLS) for tag in TAGS}
            rows.append(composite(rng, TAGS[first : first + number], means))
        else:
            rows.append(random_row(world, rng))
    return rows
