"""The files are read by `test_idioms`, and are no tests themselves."""

collect_ignore_glob = ["[0-9]*.py"]
