"""The dependencies of pyproject.toml, one a line: `python requirements.py [--extras NAME,NAME] [--without NAME...]`."""

import argparse
import re
import tomllib
from pathlib import Path


def name_of(line: str) -> str:
    return re.split(r"[<>=!~\[; ]", line)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--extras", default="", help="extras of this project, separated by commas or blanks")
    parser.add_argument("--without", nargs="*", default=[], help="dependencies to leave out")
    given = parser.parse_args()
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    optional, extras = project["optional-dependencies"], given.extras.replace(",", " ").split()
    if unknown := set(extras) - set(optional):
        raise SystemExit(f"pyproject.toml has no extra {', '.join(sorted(unknown))}, expected {', '.join(optional)}")
    names = {name_of(line) for line in project["dependencies"]}
    if unknown := set(given.without) - names:
        raise SystemExit(f"pyproject.toml does not depend on {', '.join(sorted(unknown))}")
    for line in [*project["dependencies"], *(line for extra in extras for line in optional[extra])]:
        if name_of(line) not in given.without:
            print(line)


if __name__ == "__main__":
    main()
