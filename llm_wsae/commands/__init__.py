"""The commands, one a file; those of the Hub, which are short, share ``hub.py``.

A command is a function. Its one parameter ``request`` is the dataclass of its options, or, of a
command that keeps no record, its parameters are the options; its docstring is the help. It calls
the package and returns the JSON object and the text for people. Everything heavy is imported
inside, so that help is quick. A new command is a file here and a line in ``cli.COMMANDS``.
"""
