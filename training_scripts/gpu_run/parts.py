"""Carry large files to a machine that takes little at a time: split them, and join them again.

python training_scripts/gpu_run/parts.py split FILE ... --folder parts --megabytes 28
python training_scripts/gpu_run/parts.py join --folder parts --target data
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lion_st.files import checksum


def split(files: list[Path], folder: Path, megabytes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}
    for file in files:
        sums[file.name] = checksum(file)
        with file.open("rb") as source:
            number = 0
            while block := source.read(int(megabytes * 2**20)):
                (folder / f"{file.name}.part{number:03d}").write_bytes(block)
                number += 1
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def join(folder: Path, target: Path) -> None:
    """Join what is whole; name what is not.

    Raises:
        SystemExit: If parts are missing or damaged.
    """
    target.mkdir(parents=True, exist_ok=True)
    bad = []
    for name, expected in json.loads((folder / "checksums.json").read_text(encoding="utf-8")).items():
        with (target / name).open("wb") as joined:
            for part in sorted(folder.glob(f"{name}.part*")):
                joined.write(part.read_bytes())
        if checksum(target / name) != expected:
            bad.append(name)
    if bad:
        raise SystemExit(f"Parts of {', '.join(bad)} are missing from {folder} or damaged: carry them again.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["split", "join"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--target", type=Path, default=Path("data"))
    parser.add_argument("--megabytes", type=float, default=28)
    options = parser.parse_args()
    if options.action == "split":
        split(options.files, options.folder, options.megabytes)
    else:
        join(options.folder, options.target)


if __name__ == "__main__":
    main()
