"""The commands: one function each, whose signature is its options and whose docstring is its help.

Each returns the JSON object and the text for people. Everything heavy is imported inside, so that
help comes at once. A new command is a function here and a line in ``cli.COMMANDS``.
"""
