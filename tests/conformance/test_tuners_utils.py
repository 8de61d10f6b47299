"""PEFT's tests of which modules are found."""

from .factory import rebuild


TestTargetedModuleNames = rebuild(
    "test_tuners_utils",
    "TestTargetedModuleNames",
    {},
    say_lora=("test_one_*", "test_two_*", "test_layers_to_transform_*"),
)

TestExcludedModuleNames = rebuild(
    "test_tuners_utils",
    "TestExcludedModuleNames",
    {},
    unchanged=("test_no_matching_peft_module_error_hierarchy",),
    say_lora=("test_two_*", "test_multiple_*", "test_all_*", "test_no_modules_*", "test_second_*", "test_targeted_*")
    + ("test_some_*", "test_exclude_*"),
)
