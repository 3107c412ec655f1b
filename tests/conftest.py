"""What pytest is told on the command line."""

import os

import pytest

IS_NIGHTLY = "KERAS_ACCUM_NIGHTLY" in os.environ


def pytest_addoption(parser):
    parser.addoption(
        "--strategy",
        help="The strategy under which distribution is tested: mirrored, tpu "
        "or another of `tests/test_utils.py`.",
    )


def pytest_configure(config):
    name = config.getoption("--strategy")
    if name:
        # Test modules are read later, and processes that they start, too.
        os.environ["KERAS_ACCUM_STRATEGY"] = name
    # Each process takes the tests in their order, and then those that another
    # one has left: what a class prepares is prepared once, and none waits.
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for_the_night = []
    for item in items:
        # See `test_utils.first_command`.
        for cases in getattr(item.obj, "cases_of_commands", ()):
            if item.name not in cases:
                item.add_marker("thorough")
        # What is thorough, and not among its own cases for that either.
        if len(list(item.iter_markers("thorough"))) > 1 and not IS_NIGHTLY:
            for_the_night.append(item)
    items[:] = [item for item in items if item not in for_the_night]
    # At the end, others would wait for them.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    config.hook.pytest_deselected(items=for_the_night)
