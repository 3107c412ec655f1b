"""What `BUILD` makes its targets with."""

load("@rules_python//python:defs.bzl", "py_binary", "py_library", "py_test")

def python_folder(
        name,
        libraries = {},
        programs = {},
        tests = {},
        data = {},
        label_prefix = "",
        visibility = None):
    """Makes a target of each Python file of a folder.

    The target of `folder/file.py` is named `file`, and that of the package,
    `folder/__init__.py`, is named `folder`.

    Files are given as tables of what each imports: its name without folder and
    `.py`, to a tuple of targets. A list would do, but buildifier gives each
    element of one a line of its own.

    Args:
      name: The folder, as a path from the root. It has no BUILD file.
      libraries: Files that are imported. Beside tests they are for tests only.
      programs: Files that are run.
      tests: Files that test.
      data: What files read or start when they run: file to list of labels.
      label_prefix: What comes before `file` in the names of targets, where
        other folders have files of these names.
      visibility: Of the package. All else is for this repository.
    """
    rules = (
        (py_library, libraries),
        (py_binary, programs),
        (py_test, tests),
    )
    left = dict(data)
    for rule, files in rules:
        for file, deps in files.items():
            path = "{}/{}.py".format(name, file)
            arguments = {
                "name": label_prefix + file,
                "srcs": [path],
                "data": left.pop(file, []),
                "deps": [":" + dep for dep in deps],
            }
            if file == "__init__":
                arguments["name"] = name.split("/")[-1]
                arguments["visibility"] = visibility
            if rule == py_library:
                arguments["testonly"] = bool(tests)
            else:
                arguments["main"] = path

                # What is run has the files of its targets, and no other: no
                # empty `__init__.py` that Bazel adds.
                arguments["legacy_create_init"] = 0
            rule(**arguments)
    if left:
        fail("{}/ has data of files that it has not: {}".format(name, left))
