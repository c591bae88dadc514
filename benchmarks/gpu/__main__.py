"""
The GPU kit: correctness, training and generation on one GPU, by one command, in 8 minutes at most.

    python benchmarks/gpu --output-dir runs/gpu

It needs this repository, torch, transformers and pytest, and no network. README.md beside this file says more. Every
part runs in a process of its own with a limit of time; what a part has found by then is kept, and the next one runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from report import markdown, read_rows


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Seconds of each part; what one leaves over, the next ones may use.
PARTS = {"correctness": 150, "training": 150, "generation": 170}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu"), help="default: runs/gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the kit out")
    parser.add_argument("--size", choices=("base", "tiny"), default="base", help="the 170M model, or a tiny one")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=sum(PARTS.values()), help="for all parts (default: 470)")
    parser.add_argument(
        "--tests", default="", metavar="EXPRESSION", help="only these tests of correctness (pytest -k)"
    )
    return parser


def command(part: str, args: argparse.Namespace, seconds: float) -> list[str]:
    rows = args.output_dir / f"{part}.jsonl"
    if part == "correctness":
        tests = ["-m", "gpu", "-k", args.tests] if args.tests else ["-m", "gpu"]
        plugin = ["-p", "rows_plugin", "--rows", str(rows), "-p", "no:cacheprovider"]
        return [sys.executable, "-m", "pytest", "-q", *plugin, *tests, str(ROOT / "tests" / "test_gpu.py")]
    options = ["--device", args.device, "--size", args.size, "--seconds", str(seconds), "--rows", str(rows)]
    return [sys.executable, str(HERE / f"measure_{part}.py"), *options]


def run_part(part: str, args: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Runs a part until it ends or its time is up; how it went."""
    path = os.pathsep.join([str(HERE), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    settings = {
        "PYTHONPATH": path,
        "BLOCKGEN_TEST_DEVICE": args.device,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    started = time.perf_counter()
    with (args.output_dir / f"{part}.log").open("w") as log:
        process = subprocess.Popen(
            command(part, args, 0.9 * seconds), cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log
        )
        try:
            status = str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = "stopped, its time was up"
    return {"status": status, "seconds": round(time.perf_counter() - started, 1)}


def versions() -> dict[str, object]:
    """What the figures were found with, in the form of a part."""
    import torch
    import transformers

    row = {"torch": torch.__version__, "transformers": transformers.__version__, "CUDA": torch.version.cuda}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False)
        row |= {"device": torch.cuda.get_device_name(), "nvidia-smi": said.stdout.strip()}
    return {"status": "0", "seconds": 0, "rows": [row]}


def main() -> int:
    args = make_parser().parse_args()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        print(f"error: --parts: there are {', '.join(PARTS)}, but not {', '.join(unknown)}.", file=sys.stderr)
        return 2
    args.output_dir = args.output_dir.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for part in parts:
        (args.output_dir / f"{part}.jsonl").unlink(missing_ok=True)
    share = args.seconds / sum(PARTS[part] for part in parts)
    started, planned, found = time.perf_counter(), 0.0, {"versions": versions()}
    for part in parts:
        planned += share * PARTS[part]
        seconds = planned - (time.perf_counter() - started)
        found[part] = {**run_part(part, args, seconds), "rows": read_rows(args.output_dir / f"{part}.jsonl")}
        print(f"{part}: exit status {found[part]['status']}, {found[part]['seconds']} s", flush=True)
        (args.output_dir / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.output_dir / "results.md").write_text(markdown(found))
    print((args.output_dir / "results.md").read_text())
    return int(any(each["status"] != "0" for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
