"""Writes torch_lstm.npz: outputs and gradients of `torch.nn.LSTM` on packed sequences, two layers, both directions.

Needs torch: `pip install torch==2.13.0 numpy`, then `python tests/golden/make_torch_lstm.py`.
Weights keep PyTorch's names; computed in float64, stored in float32.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "torch_lstm.npz"
FEATURES, HIDDEN, LAYERS, LENGTHS, FRAMES = 5, 4, 2, (7, 4, 1), 9


def make_inputs() -> dict[str, np.ndarray]:
    """Frames with noise in the padding, and the gradient of the loss with respect to the outputs: float32."""
    rng = np.random.default_rng(11)
    shapes = dict(x=(len(LENGTHS), FRAMES, FEATURES), cotangent=(len(LENGTHS), FRAMES, 2 * HIDDEN))
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"lengths": np.array(LENGTHS, np.int32)}


def main() -> None:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    given = make_inputs()
    model = torch.nn.LSTM(FEATURES, HIDDEN, LAYERS, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)  # gates far from a half
    model = model.double()
    x = torch.from_numpy(given["x"]).double().requires_grad_()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True)
    output, _ = pad_packed_sequence(model(packed)[0], batch_first=True, total_length=FRAMES)
    (output * torch.from_numpy(given["cotangent"]).double()).sum().backward()
    results = {"output": output, "gradient/x": x.grad}
    for name, weight in model.named_parameters():
        results |= {f"weight/{name}": weight, f"gradient/{name}": weight.grad}
    arrays = {name: value.detach().numpy().astype(np.float32) for name, value in results.items()}
    np.savez_compressed(FILE, **given, **arrays)


if __name__ == "__main__":
    main()
