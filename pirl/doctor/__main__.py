"""`python -m pirl.doctor ROOT`, in a pod of `pirl doctor --cluster`: storage, torch and GPUs as a rank has them."""

import sys
import uuid

import torch

from .. import logs
from ..errors import EXIT_DONE, EXIT_FAILURE, EXIT_USAGE, PirlError
from ..storage import open_storage
from ..text import count


def main(arguments: list[str]) -> int:
    logs.configure()
    if len(arguments) != 1:
        print("usage: python -m pirl.doctor ROOT", file=sys.stderr)
        return EXIT_USAGE
    name, data = f"doctor/{uuid.uuid4().hex}", b"written by pirl doctor"
    try:
        root = open_storage(arguments[0])
        root.write_bytes(name, data)
        whole = root.read_bytes(name) == data and name in root.list("doctor/")
        root.delete(name)
    except PirlError as error:
        print(f"{error.what}; {error.hint}", file=sys.stderr)
        return EXIT_FAILURE
    print(f"{root.uri} {'can be written, listed and read' if whole else 'gives back other bytes than were written'}")
    print(f"torch {torch.__version__}, {count(torch.cuda.device_count(), 'GPU')}")
    return EXIT_DONE if whole else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
