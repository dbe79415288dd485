"""What an export wrote, and how far the file agrees with the model."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_compress import tables

UNKNOWN = float("nan")


@dataclass(frozen=True)
class ExportedLayer:
    """How one quantized weight and its layer's input are in the file.

    Args:
        name: full parameter name.
        weight: "int8", "uint8", "uint8 indices" (into a table of its values) or "float32".
        input: "int8", "uint8", "dynamic uint8", or "float32" if the layer computes with float32 inputs.
        reason: why not all of it is integers, or "".
    """

    name: str
    weight: str
    input: str
    reason: str


@dataclass(frozen=True)
class ExportReport:
    """An ONNX file, beside the model it came from.

    Args:
        path: of the file.
        precision: "int8" or "float32".
        file_bytes: its length.
        float32_bytes: length of the same model as a float32 file; 0 if none was made.
        layers: the quantized weights.
        top1_agreement: share of samples whose largest output is the same in ONNX Runtime and in PyTorch; NaN without
            check, or if the output has no classes.
        within_step: share of output values that differ by at most ``step``; NaN without check.
        max_difference: largest difference of an output value; NaN without check.
        rms_difference: root mean square of the differences.
        rms_rounding: the same of what rounding the activations changes: the model against itself with activations that
            are not rounded.
        step: one step of the output's quantizer, or of an 8-bit grid over the outputs seen if it has none.
        samples: given inputs that were compared; random ones are checked besides.
        opset: of ONNX.
        versions: of torch, onnx and onnxruntime.
        notes: what else there is to know.
    """

    path: str
    precision: str
    file_bytes: int
    float32_bytes: int
    layers: tuple[ExportedLayer, ...]
    top1_agreement: float
    within_step: float
    max_difference: float
    rms_difference: float
    rms_rounding: float
    step: float
    samples: int
    opset: int
    versions: dict[str, str]
    notes: tuple[str, ...]

    @property
    def size_ratio(self) -> float:
        """``file_bytes / float32_bytes``; below 1 is smaller."""
        return self.file_bytes / self.float32_bytes if self.float32_bytes else UNKNOWN

    def __str__(self) -> str:
        rows: list[list[object]] = [
            ["file_bytes", self.file_bytes],
            ["float32_bytes", self.float32_bytes or UNKNOWN],
            ["size ratio", self.size_ratio],
            ["weights as integers", sum(layer.weight != "float32" for layer in self.layers)],
            ["weights as float32", sum(layer.weight == "float32" for layer in self.layers)],
            ["top-1 agreement", self.top1_agreement],
            ["outputs within one step", self.within_step],
            ["max difference", self.max_difference],
            ["rms difference", self.rms_difference],
            ["rms effect of rounding", self.rms_rounding],
            ["one step", self.step],
            ["samples compared", self.samples],
        ]
        parts = [tables.text([f"{self.precision} ONNX", "value"], [[a, tables.cell(b)] for a, b in rows])]
        if self.layers:
            header = ["weight", "stored as", "input", "reason"]
            parts.append(tables.text(header, [[x.name, x.weight, x.input, x.reason] for x in self.layers]))
        made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n\n".join([*parts, "\n".join([*self.notes, f"opset {self.opset}; {made}"])])
