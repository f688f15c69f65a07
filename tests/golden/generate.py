"""Write `cases.safetensors`: expected values of routing and gate training, by the textbook.

Plain numpy, one token after the other, without importing this library, so that it is independent.
Run `python tests/golden/generate.py` to write the file again.

Shape suffixes: T tokens, D input features, O output features, E experts, K kept per token, R rank.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[np.float64]
FILE = Path(__file__).parent / "cases.safetensors"

# T, D, O, E, K, R
ROUTED = {
    "plain": (12, 24, 16, 7, 2, 4),
    "top1": (9, 16, 24, 5, 1, 8),
    "odd_rank": (10, 20, 12, 6, 3, 3),
    "one_expert": (5, 12, 8, 1, 1, 4),
    "one_expert_of_two": (5, 12, 8, 1, 2, 2),
    "more_kept_than_experts": (6, 16, 12, 3, 8, 5),
    "many_experts": (20, 16, 12, 60, 2, 4),
    "one_token": (1, 16, 12, 30, 4, 4),
    "odd_width": (8, 13, 11, 5, 2, 6),
}


def draw(random: np.random.Generator, *shape: int) -> Array:
    """Draw normal numbers that float32 represents exactly, so that tests use the same ones."""
    return random.normal(size=shape).astype(np.float32).astype(np.float64)


def standardize(vector: Array) -> Array:
    """Normalize to mean 0 and variance 1 (LayerNorm without affine part, eps 1e-5)."""
    return np.asarray((vector - vector.mean()) / np.sqrt(vector.var() + 1e-5))


def route(x_D: Array, gates_ED: Array, top_k: int) -> tuple[list[float], list[int]]:
    """Return the weights and experts of one token, best first."""
    gates = [standardize(gate_D) for gate_D in gates_ED]
    scores = [float(standardize(x_D) @ gate_D) / np.sqrt(len(x_D)) for gate_D in gates]
    exponentials = [np.exp(score) for score in scores]
    probabilities = [e / sum(exponentials) for e in exponentials]
    best = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:top_k]
    kept = sum(probabilities[expert] for expert in best)
    return [probabilities[expert] / (kept + 1e-6) for expert in best], best


def routed_case(random: np.random.Generator, sizes: tuple[int, ...]) -> dict[str, Array]:
    """Return inputs, routing and output of one linear's experts."""
    tokens, inputs, outputs, experts, top_k, rank = sizes
    x_TD, gates_ED = draw(random, tokens, inputs), draw(random, experts, inputs)
    A_ERD, B_EOR = draw(random, experts, rank, inputs), draw(random, experts, outputs, rank)
    routing = [route(x_D, gates_ED, top_k) for x_D in x_TD]
    y_TO = np.zeros((tokens, outputs))
    for token, (weights, chosen) in enumerate(routing):
        for weight, expert in zip(weights, chosen, strict=True):
            y_TO[token] += weight / rank * (B_EOR[expert] @ (A_ERD[expert] @ x_TD[token]))
    return {
        "x_TD": x_TD,
        "gates_ED": gates_ED,
        "lora_A_ERD": A_ERD,
        "lora_B_EOR": B_EOR,
        "weights_TK": np.array([weights for weights, _ in routing]),
        "indices_TK": np.array([experts for _, experts in routing]),
        "y_TO": y_TO,
    }


def gate_case(random: np.random.Generator) -> dict[str, Array]:
    """Return one gated expert: its output, and the gate's gradient of half the squared output."""
    tokens, inputs, outputs, rank = 6, 14, 10, 3
    x_TD, gate_D = draw(random, tokens, inputs), draw(random, inputs) / 4
    A_RD, B_OR = draw(random, rank, inputs), draw(random, outputs, rank)
    y_TO, gradient_D = np.zeros((tokens, outputs)), np.zeros(inputs)
    for token, x_D in enumerate(x_TD):
        gate = 1 / (1 + np.exp(-gate_D @ x_D))
        ungated_O = B_OR @ (A_RD @ x_D) / rank
        y_TO[token] = gate * ungated_O
        gradient_D += (y_TO[token] @ ungated_O) * gate * (1 - gate) * x_D
    return {
        "x_TD": x_TD,
        "gate_D": gate_D,
        "lora_A_RD": A_RD,
        "lora_B_OR": B_OR,
        "y_TO": y_TO,
        "gradient_D": gradient_D,
    }


def main(file: Path = FILE) -> None:
    """Compute every case and write one file, in float32 (expert indices in int64)."""
    cases = {"gate_training": gate_case(np.random.default_rng(0))}
    for name, sizes in ROUTED.items():
        cases[name] = routed_case(np.random.default_rng(sum(sizes)), sizes)
    tensors = {}
    for case, values in cases.items():
        for name, array in values.items():
            kind = np.int64 if name == "indices_TK" else np.float32
            tensors[f"{case}.{name}"] = array.astype(kind)
    save_file(tensors, file)


if __name__ == "__main__":
    main()
