"""The commands: each a function whose signature is its options and whose docstring its help.

One a file, except those of the Hub, which are short and share ``hub.py``.

Each parses, calls the package, and returns the JSON object and the text for people. Everything
heavy is imported inside, so that help is quick. A new command is a file here and a line in
``cli.COMMANDS``.
"""
