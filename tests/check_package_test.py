"""`tools/check_package.py` sees what a release should not be."""

from absl.testing import absltest

from tools import check_package

TRACKED = (
    ".ci/run",
    ".gitignore",
    "LICENSE",
    "README.md",
    "keras_accum/__init__.py",
    "keras_accum/py.typed",
)
WHEEL = (
    "keras_accum/__init__.py",
    "keras_accum/py.typed",
    "keras_accum-0.2.0.dist-info/METADATA",
    "keras_accum-0.2.0.dist-info/RECORD",
    "keras_accum-0.2.0.dist-info/WHEEL",
    "keras_accum-0.2.0.dist-info/licenses/LICENSE",
)
SDIST = tuple(
    f"keras_accum-0.2.0/{name}" for name in ("PKG-INFO", *TRACKED[1:])
)
CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-28\n"
CITATION = 'version: "0.2.0"\ndate-released: "2026-11-28"\n'


class CheckPackageTest(absltest.TestCase):
    def test_wheel(self):
        def check(names, tracked=TRACKED):
            return check_package.check_wheel(names, tracked, "0.2.0")

        self.assertEmpty(check(WHEEL))
        self.assertEqual(
            check([*WHEEL[:1], *WHEEL[2:], "tests/model_test.py"]),
            [
                "keras_accum/py.typed is missing",
                "tests/model_test.py should not be there",
            ],
        )
        self.assertLen(check([WHEEL[0], *WHEEL[2:]], TRACKED[:-1]), 1)
        self.assertNotEmpty(check(WHEEL[:-1]))

    def test_sdist(self):
        def check(names):
            return check_package.check_sdist(names, TRACKED, "0.2.0")

        self.assertEmpty(check(SDIST))
        self.assertEqual(
            check([*SDIST[1:], "keras_accum-0.2.0/.ci/run"]),
            [
                "keras_accum-0.2.0/PKG-INFO is missing",
                "keras_accum-0.2.0/.ci/run should not be there",
            ],
        )

    def test_description(self):
        check = check_package.check_description
        self.assertEmpty(check("[Hoffer](https://arxiv.org/abs/1705.08741)"))
        for text in (
            "[start](docs/start.md)",
            "![memory](docs/memory_limit.png)",
            "[the\nlicense](LICENSE)",
            "[above](#install)",
        ):
            self.assertLen(check(text), 1)

    def test_versions(self):
        check = check_package.check_versions
        self.assertEmpty(check("0.2.0", CHANGELOG, CITATION))
        self.assertLen(check("0.3.0", CHANGELOG, CITATION), 2)
        self.assertLen(check("0.2.0", CHANGELOG.splitlines()[0], CITATION), 1)
        self.assertLen(check("0.2.0", CHANGELOG, CITATION.upper()), 1)
        other = CITATION.replace("28", "29")
        self.assertLen(check("0.2.0", CHANGELOG, other), 1)


if __name__ == "__main__":
    absltest.main()
