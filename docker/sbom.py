"""The packages of an environment as a CycloneDX 1.5 document: `python sbom.py SITE-PACKAGES... > sbom.json`."""

import json
import sys
from importlib.metadata import distributions


def components(folders: list[str]) -> list[dict[str, object]]:
    """Return each distribution once, by name."""
    found = {}
    for each in distributions(path=folders):
        name, licence = each.metadata["Name"], each.metadata["License-Expression"] or each.metadata["License"]
        entry: dict[str, object] = {"type": "library", "name": name, "version": each.version}
        entry["purl"] = f"pkg:pypi/{name.lower().replace('_', '-')}@{each.version}"
        if licence and len(licence) < 80:
            entry["licenses"] = [{"license": {"name": licence}}]
        found[name.lower()] = entry
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    document = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components(sys.argv[1:])}
    print(json.dumps(document, indent=1))
