"""What a user's script is to a sweep: it takes some options, and writes all_results.json."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--optim", default="none")
for name in ("learning_rate", "sleep", "die_at", "spread"):
    parser.add_argument(f"--{name}", type=float, default=0.0)
for name in ("seed", "epochs", "images"):
    parser.add_argument(f"--{name}", type=int, default=0)
for name in ("output_dir", "begun", "mode", "lr_scheduler_type"):
    parser.add_argument(f"--{name}", default="")
args = parser.parse_args()
if args.begun:  # a line for each start
    with open(args.begun, "a") as file:
        file.write(f"{Path(args.output_dir).name} {os.getpid()}\n")
time.sleep(args.sleep)
if args.learning_rate == args.die_at:
    sys.exit("ValueError: it died")
folder = Path(args.output_dir)
results = {"accuracy": 1 - args.learning_rate, "threads": os.environ["OMP_NUM_THREADS"]}
results |= {"data": args.mode, "learning_rate": args.learning_rate, "here": os.getcwd()}
if args.mode == "diverged":
    results |= {"accuracy": None, "finished": True}
if args.mode != "silent":
    (folder / "all_results.json").write_text(json.dumps(results))
if "lip" in args.optim:
    scale = 2.0 + args.spread * args.seed
    rates = {"steps": [1, 2], "scale": {"a": [None, scale], "b": [scale, 2.0 + args.seed]}}
    (folder / "layer_learning_rates.json").write_text(json.dumps(rates))
(folder / "model.safetensors").write_text("large")
sys.exit(args.mode == "diverged")
