"""The pocket backbone and its suites: what they promise, checked against the definitions of `world`."""

import itertools
import json
import random
from collections import Counter

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from moe_peft import LinearMoeConfig
from moe_peft.pocket import (
    POCKET_DIR,
    SUITES,
    exact_match,
    exact_match_generated,
    knowledge_probe,
    make_suite,
    make_world,
    per_domain,
)
from moe_peft.pocket.suites import COMPOSABLE_SKILLS, TAGS
from moe_peft.pocket.tokenizer import CHARACTERS, SPECIAL_TOKENS, make_tokenizer
from moe_peft.pocket.world import ATTRIBUTES, SKILLS, TAGGED_SKILLS, Row, random_row, skill_row, tagged_row
from moe_peft.trial import load_pocket


CONVERSATION = [
    {"role": "user", "content": "rev:abc>"},
    {"role": "assistant", "content": "cba"},
    {"role": "user", "content": "upper:ab>"},
    {"role": "assistant", "content": "AB"},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(POCKET_DIR, dtype=torch.float32)


@pytest.fixture(scope="module")
def nf4_model():
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        POCKET_DIR, quantization_config=quantization_config, device_map={"": "cpu"}
    )


def share(matches):
    return sum(matches) / len(matches)


def skill_rows(per_skill=12):
    rng = random.Random("test")
    rows = [skill_row(rng, skill) for skill in SKILLS for _ in range(per_skill)]
    return rows + [tagged_row(rng, tag) for tag in TAGGED_SKILLS for _ in range(per_skill)]


# ----- The backbone -----


def test_the_shipped_files_are_small():
    assert sum(file.stat().st_size for file in POCKET_DIR.iterdir()) < 12e6


@pytest.mark.parametrize("phrasing", [0, 1])
@pytest.mark.parametrize("backbone", ["model", "nf4_model"])
def test_the_backbone_knows_the_facts(request, backbone, phrasing, tokenizer):
    assert share(exact_match(request.getfixturevalue(backbone), tokenizer, knowledge_probe(phrasing))) >= 0.95


def test_the_backbone_has_the_skills_and_attends_to_the_tags(model, tokenizer):
    assert share(exact_match(model, tokenizer, skill_rows())) >= 0.85


def test_teacher_forcing_and_generation_agree(model, tokenizer):
    # Known facts, facts that contradict them and skills: right answers and wrong ones.
    rows = knowledge_probe()[:40] + make_suite("fact8tag").test[:40] + skill_rows(per_skill=3)
    forced = exact_match(model, tokenizer, rows, batch_size=64)
    assert 0.3 < share(forced) < 0.9
    assert forced == exact_match_generated(model, tokenizer, rows, batch_size=64)


def test_a_gate_over_the_prompt_does_not_see_the_answer_that_is_scored(tokenizer):
    torch.manual_seed(0)
    config = LinearMoeConfig(
        num_experts=4,
        r=2,
        lora_alpha=200,
        target_modules=["up_proj", "down_proj"],
        router_granularity="sequence",
        routing="softmax",
        router_init_std=3.0,
        init_weights=False,
    )
    adapted = get_peft_model(load_pocket(quantize=False)[0], config)
    rows = knowledge_probe()[:60] + skill_rows(per_skill=3)
    forced = exact_match(adapted, tokenizer, rows, batch_size=64)
    assert 0.05 < share(forced) < 0.95
    assert forced == exact_match_generated(adapted, tokenizer, rows, batch_size=64)


@pytest.mark.parametrize("backbone", ["model", "nf4_model"])
def test_scoring_leaves_the_model_as_it_was(request, backbone, tokenizer):
    model = request.getfixturevalue(backbone)
    model.train()
    model.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact_match(model, tokenizer, knowledge_probe()[:4])
    assert model.training
    assert model.model.layers[1].mlp.training
    assert not model.model.layers[0].mlp.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_matches_are_counted_per_domain():
    rows = [Row(prompt="", completion="", domain=domain) for domain in "abab"]
    assert per_domain(rows, [True, False, True, True]) == {"a": 1.0, "b": 0.5}


# ----- The tokenizer -----


def test_the_shipped_tokenizer_is_the_one_the_code_makes(tokenizer):
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer().chat_template


def test_every_character_is_one_token_and_comes_back(tokenizer):
    ids = tokenizer(CHARACTERS)["input_ids"]
    assert len(ids) == len(set(ids)) == 96
    assert tokenizer.decode(ids) == CHARACTERS
    assert len(tokenizer) == len(CHARACTERS) + len(SPECIAL_TOKENS)
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_padding_is_on_the_right_and_is_not_the_end_of_text(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer(["abc", "a"], padding=True)
    assert batch["input_ids"][1][1:] == [tokenizer.pad_token_id] * 2
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]


def test_a_longer_conversation_begins_like_the_shorter_one(tokenizer):
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert whole == "rev:abc>cba<eos>upper:ab>AB<eos>"
    for turns in range(1, len(CONVERSATION)):
        part = tokenizer.apply_chat_template(
            CONVERSATION[:turns], tokenize=False, add_generation_prompt=turns % 2 == 1
        )
        assert whole.startswith(part)


def test_the_generation_mask_is_what_the_assistant_says_and_its_end(tokenizer):
    encoded = tokenizer.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, said in pairs if said]) == "cba<eos>AB<eos>"


# ----- The world -----


def test_the_world_holds_480_facts_and_two_phrasings():
    world = make_world()
    assert len(set(world.people)) == 160
    assert len(knowledge_probe(0)) == len(knowledge_probe(1)) == len(world.facts) == 480
    for direct, turned in zip(knowledge_probe(0), knowledge_probe(1), strict=True):
        assert direct["prompt"] != turned["prompt"]
        assert direct["completion"] == turned["completion"]
        assert direct["completion"] in ATTRIBUTES[direct["domain"]]


@pytest.mark.parametrize(
    ("skill", "answer"),
    [("rev", "zacb"), ("next", "cdba"), ("swap", "cbza"), ("rotl", "cazb"), ("rotr", "zbca")]
    + [("dbl", "bbccaazz"), ("odd", "ba"), ("even", "cz"), ("sort", "abcz"), ("len", "4"), ("top", "z")],
)
def test_skills_do_what_their_names_say(skill, answer):
    assert SKILLS[skill]("bcaz") == answer


def test_documents_are_written_in_known_characters():
    world, rng = make_world(), random.Random(0)
    rows = [random_row(world, rng) for _ in range(500)]
    assert set("".join(row["prompt"] + row["completion"] for row in rows)) <= set(CHARACTERS)
    assert all(row["completion"] for row in rows)


# ----- The suites -----


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_depends_on_its_seed_alone(name):
    assert make_suite(name, 3) == make_suite(name, 3)
    assert make_suite(name, 3).train != make_suite(name, 4).train


@pytest.mark.parametrize("name", SUITES)
def test_every_domain_is_in_both_halves_equally_often(name):
    suite = make_suite(name)
    assert suite.name == name
    assert len(suite.domains) == 8
    for rows in (suite.train, suite.test):
        counts = [sum(row["domain"] == domain for row in rows) for domain in suite.domains]
        assert counts == [len(rows) // 8] * 8
        assert all(row.keys() == {"prompt", "completion", "domain"} and row["completion"] for row in rows)


@pytest.mark.parametrize("name", [name for name in SUITES if name != "fact8tag"])
def test_no_prompt_that_is_tested_was_trained_on(name):
    suite = make_suite(name)
    trained = {row["prompt"] for row in suite.train}
    assert len(trained) == len(suite.train)
    assert not trained & {row["prompt"] for row in suite.test}


def test_fact8tag_tests_memory_so_it_asks_exactly_what_it_taught():
    suite = make_suite("fact8tag", num_people=6, repeats=(1, 3))
    taught = Counter((row["prompt"], row["completion"]) for row in suite.train)
    assert sorted(taught) == sorted((row["prompt"], row["completion"]) for row in suite.test)
    assert Counter(taught.values()) == {1: 3 * 8, 3: 3 * 8}


def test_fact8tag_contradicts_itself_and_the_world():
    suite, world = make_suite("fact8tag", num_people=10, attributes=("town", "pet")), make_world()
    told = {row["prompt"]: row["completion"] for row in suite.train}
    questions = {prompt.split("|")[1] for prompt in told}
    assert len(questions) == 20
    for question in questions:
        person, attribute = question.removesuffix(">").split()
        assert len({world.facts[person, attribute]} | {told[f"{tag}|{question}"] for tag in TAGS}) == 9


@pytest.mark.parametrize("num_letters", [8, 26])
def test_cipher8tag_substitutes_every_letter_differently_under_every_tag(num_letters):
    size = {"shortest": 2, "longest": 4, "num_train": 200, "num_test": 20}
    suite = make_suite("cipher8tag", num_letters=num_letters, **size)
    pairs = {tag: set() for tag in TAGS}
    for row in suite.train + suite.test:
        text = row["prompt"].removesuffix(">").split(":")[1]
        pairs[row["domain"]] |= set(zip(text, row["completion"], strict=True))
    assert all(len(found) == len(dict(found)) == num_letters for found in pairs.values())
    assert not any(one & other for one, other in itertools.combinations(pairs.values(), 2))


@pytest.mark.parametrize("depth", [1, 2])
def test_opconf8tag_means_something_else_than_what_was_taught(depth):
    suite = make_suite("opconf8tag", depth=depth)
    for tag in TAGS:
        rows = [row for row in suite.test if row["domain"] == tag]
        texts = [row["prompt"].removesuffix(">").split(":")[1] for row in rows]
        same = [SKILLS[TAGGED_SKILLS[tag]](text) == row["completion"] for text, row in zip(texts, rows, strict=True)]
        assert share(same) < 0.5


def chains_without_repeats(domains, used=()):
    """One chain for each domain such that no place holds a skill twice, or None; `domains` are lists of candidates."""
    if len(used) == len(domains):
        return used
    for chain in domains[len(used)]:
        if not any(skill in place for skill, place in zip(chain, zip(*used, strict=True), strict=bool(used))):
            found = chains_without_repeats(domains, (*used, chain))
            if found:
                return found
    return None


@pytest.mark.parametrize("seed", range(4))
def test_balanced_chains_hold_every_skill_once_in_each_place(seed):
    suite = make_suite("opconf8tag", seed, balanced=True, num_train=40, num_test=8)
    candidates = []
    for tag in TAGS:
        rows = [row for row in suite.train if row["domain"] == tag]
        texts = [row["prompt"].removesuffix(">").split(":")[1] for row in rows]
        answers = [row["completion"] for row in rows]
        pairs = itertools.permutations(COMPOSABLE_SKILLS, 2)  # no skill after itself
        candidates.append([(a, b) for a, b in pairs if [SKILLS[b](SKILLS[a](text)) for text in texts] == answers])
    assert all(candidates)
    assert len(chains_without_repeats(candidates)) == len(TAGS)


def test_the_rows_can_be_written_as_json_lines():
    row = make_suite("multi").train[0]
    assert json.loads(json.dumps(row)) == row


# ----- What is refused, and how -----


def test_an_unknown_suite_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"`name` is 'fact8', .*fact8tag, cipher8tag.*nearest is 'fact8tag'"):
        make_suite("fact8")


@pytest.mark.parametrize(
    ("name", "difficulty", "message"),
    [
        ("fact8tag", {"num_people": 0}, "`num_people` is 0, .* 1 to 160"),
        ("fact8tag", {"attributes": ("hat",)}, "`attributes` .*'hat'.* town, job, pet"),
        ("fact8tag", {"repeats": (0, 2)}, r"`repeats` is \(0, 2\), .* from 1 up"),
        ("cipher8tag", {"num_letters": 7}, "`num_letters` is 7, .* 8 to 26"),
        ("cipher8tag", {"num_letters": 8, "longest": 2}, r"`num_train` \+ `num_test` is .* 1 to 32"),
        ("opconf8tag", {"depth": 4}, "`depth` is 4, .* 1, 2 or 3"),
        ("opconf8tag", {"depth": 1, "balanced": True}, "`depth` is 1, .* 2 or 3"),
    ],
)
def test_impossible_difficulties_are_refused(name, difficulty, message):
    with pytest.raises(ValueError, match=message):
        make_suite(name, **difficulty)
