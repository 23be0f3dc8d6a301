"""The README's table of optimizer state for Llama 60M to 7B: counted on the meta device, nothing is allocated.

    python benchmarks/memory_table.py            # print it
    python benchmarks/memory_table.py --write    # put it into README.md

The models are GaLore's Llama configurations with 32,000 tokens and untied head; the state is float32, and includes
what embeddings, head and norms need. LoRA-Pre is LoRAPreAdamW with its defaults. Bytes are those of the optimizers' own
state tensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorapre import estimate_memory, param_groups
from lorapre.lab.models import LLAMAS, resolve_model

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- memory table: begin -->", "<!-- memory table: end -->"

#: The paper's ranks; it has none for 7B, where a quarter of the width continues the 1B row.
PAPER_RANKS = {"llama-60m": 128, "llama-130m": 256, "llama-350m": 256, "llama-1b": 512, "llama-7b": 1024}


def row(name: str) -> str:
    """One line: the model, AdamW's state, and LoRA-Pre's at the paper's rank and at a 32nd of the width."""
    model = resolve_model(name).build(0, device="meta")
    parameters = sum(param.numel() for param in model.parameters())
    low = LLAMAS[name].hidden // 32
    cells = [f"Llama {name.removeprefix('llama-').upper()}", f"{parameters / 1e6:,.0f} M"]
    for rank in (PAPER_RANKS[name], low):
        memory = estimate_memory(param_groups(model, rank=rank))
        if len(cells) == 2:
            cells.append(f"{memory.adamw_state / 1e9:.2f} GB")
        cells.append(f"{memory.state / 1e9:.2f} GB (r = {rank})")
        matrices = estimate_memory([group for group in param_groups(model, rank=rank) if group.get("compress", True)])
        cells.append(f"{matrices.adamw_state / matrices.state:.1f} x")
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The whole table in Markdown."""
    head = (
        "| model | parameters | AdamW | LoRA-Pre, the paper's rank | smaller on matrices "
        "| LoRA-Pre, r = d/32 | smaller on matrices |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(row(name) for name in PAPER_RANKS)])


def main() -> None:
    """Print the table, or write it between its marks in README.md."""
    if "--write" not in sys.argv:
        print(table())
        return
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
