"""Print the tables of docs/curves.md: values at several steps, from the stored logs.

    python study/curves.py

Each cell is the range over the logs in study/logs/NAME/*/log.jsonl, or the value of a single log.
"""
import json
from pathlib import Path

LOGS = Path(__file__).parent / "logs"
TABLES = {  # folder of logs: steps (rows), quantities (columns)
    "nano-shapes": ((1, 50, 100, 200, 300, 400, 480),
                    ("loss", "dino", "ibot", "koleo", "clip", "rec", "teacher_entropy",
                     "feature_std")),
    "nano-cifar10": ((1, 100, 200, 300, 480),
                     ("loss", "dino", "ibot", "koleo", "clip", "rec", "teacher_entropy",
                      "feature_std")),
    "S-shapes": ((1, 50, 100, 150, 200),
                 ("loss", "dino", "ibot", "koleo", "clip", "rec", "teacher_entropy",
                  "feature_std")),
    "pico-dit-shapes": ((1, 50, 100, 200, 400, 600, 750), ("loss", "mse", "cos"))}


def read_logs(name):
    """-> list of {step: line} of the logs of one setting"""
    logs = []
    for path in sorted((LOGS / name).glob("*/log.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        logs.append({line["step"]: line for line in lines})
    return logs


def cell(values):
    """-> the range of some values, as text with two decimals"""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def table(name):
    """-> a table in Markdown"""
    steps, quantities = TABLES[name]
    logs = read_logs(name)
    lines = [" | ".join(["| step", *quantities]) + " |", "|---" * (1 + len(quantities)) + "|"]
    for step in steps:
        cells = [cell([log[step][quantity] for log in logs]) for quantity in quantities]
        lines.append(" | ".join([f"| {step}", *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name in TABLES:
        print(f"{name}, {len(read_logs(name))} logs\n\n{table(name)}")
