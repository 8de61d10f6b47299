"""How many experts each layer gets: every way to write it, and every way to write it wrong."""

import pytest

from moe_peft.allocation import expand, is_uniform, parse


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (1, (1,)),
        (8, (8,)),
        ("8", (8,)),
        ("2:4:6:8", (2, 4, 6, 8)),
        (" 2 : 4 ", (2, 4)),
        ([2, 4, 6], (2, 4, 6)),
        ((2, 4), (2, 4)),
        ([3], (3,)),
    ],
)
def test_an_allocation_names_its_numbers_in_order(value, numbers):
    assert parse(value, "num_experts") == numbers


@pytest.mark.parametrize(
    "value",
    [0, -1, True, 2.0, None, "", ":", "2:", "2::4", "-2", "2.5", "2:x", "0", "4:0", [], [2, 0], [2, True], [2, "4"]],
)
def test_what_is_no_allocation_is_refused(value):
    sentence = r"`r` is .*, but must be a whole number of at least 1, .*\"2:4:6:8\".*list with one per layer. (W|C)"
    with pytest.raises(ValueError, match=sentence) as error:
        parse(value, "r")
    assert f"`r` is {value!r}," in str(error.value)


@pytest.mark.parametrize("value", [5, "5"])
@pytest.mark.parametrize("layers", [1, 7, 32])
def test_one_number_is_for_every_layer(value, layers):
    assert is_uniform(value)
    assert expand(value, layers, "r") == [5] * layers


@pytest.mark.parametrize("value", ["2:4", "2:2", [5], [5, 5]])
def test_what_speaks_of_layers_is_not_uniform_even_if_its_numbers_are_equal(value):
    assert not is_uniform(value)


def test_a_list_is_taken_as_it_is():
    assert expand([5, 1, 3], 3, "r") == [5, 1, 3]


def test_molas_four_groups_are_blocks_of_eight_in_32_layers():
    assert expand("2:4:6:8", 32, "num_experts") == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8


@pytest.mark.parametrize("layers", [4, 5, 22, 24, 28, 33])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_groups_are_consecutive_and_nearly_equal(layers, groups):
    numbers = list(range(1, groups + 1))
    expanded = expand(":".join(map(str, numbers)), layers, "num_experts")
    assert len(expanded) == layers
    assert expanded == sorted(expanded)
    sizes = [expanded.count(number) for number in numbers]
    assert max(sizes) - min(sizes) <= 1


def test_more_groups_than_layers_are_refused():
    sentence = (
        r"`num_experts` is '1:2:3', but must be a pattern of at most 2 groups.* 2 layers.*names 3 groups; drop 1 "
    )
    with pytest.raises(ValueError, match=sentence):
        expand("1:2:3", 2, "num_experts")


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_list_of_the_wrong_length_is_refused(layers):
    sentence = (
        rf"`r` is \[1, 2, 3\], but must be a list of {layers} numbers.*It has 3\..*groups as a string: \"1:2:3\""
    )
    with pytest.raises(ValueError, match=sentence):
        expand([1, 2, 3], layers, "r")
