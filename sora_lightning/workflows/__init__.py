"""Lists of commands that are run in order and resumed."""
