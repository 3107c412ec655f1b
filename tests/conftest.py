"""What pytest is told on the command line."""

import os

import pytest


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
def pytest_collection_modifyitems(items):
    for item in items:
        # See `test_utils.first_command`.
        cases = getattr(item.obj, "first_cases", None)
        if cases is not None and item.name not in cases:
            item.add_marker("thorough")
