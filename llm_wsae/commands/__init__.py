"""The commands: each parses nothing itself, calls the package, and says what came of it.

A command is a function. Its parameters, or the fields of its one ``request``, are its options; its
docstring is its help. It imports what needs torch when it is called, so that help is quick.
"""

from typing import Any

Result = tuple[dict[str, Any], str]  # the JSON object, the text for people
