"""The dependencies of pyproject.toml, one a line: `python requirements.py [--without NAME...]`."""

import re
import sys
import tomllib
from pathlib import Path


def main(arguments: list[str]) -> None:
    without = set(arguments[1:]) if arguments[:1] == ["--without"] else set()
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=!~\[; ]", line)[0] for line in project["dependencies"]}
    if unknown := without - names:
        raise SystemExit(f"pyproject.toml does not depend on {', '.join(sorted(unknown))}")
    for line in project["dependencies"]:
        if re.split(r"[<>=!~\[; ]", line)[0] not in without:
            print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
