"""What the API page is told of `keras_accum.attributes.option`.

mkdocstrings reads sources and does not run them, so that it knows a property
by the name of its decorator alone. `mkdocs.yml` names this file as one of its
`extensions`.
"""

import griffe


class WritableProperties(griffe.Extension):
    """Makes properties of what `@option` decorates."""

    def on_function_node(self, *, node, **_):
        """Reads `@option` as `@property`."""
        for decorator in node.decorator_list:
            if getattr(decorator, "id", None) == "option":
                decorator.id, node.is_option = "property", True

    def on_attribute_instance(self, *, node, attr, **_):
        """Says that an option may be set."""
        if getattr(node, "is_option", False):
            attr.labels.add("writable")
