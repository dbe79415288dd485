"""Names of an earlier data-free framework, for scripts written for it; each hands on to this library.

=========================  =======================================================
earlier                    here
=========================  =======================================================
`compress_model`           `lc.analyze`, then `lc.write_report`
`apply_magnitude_pruning`  `lc.compress(model, [lc.Prune(amount, scope="layer")])`
`apply_log2_quantization`  `lc.compress(model, [lc.Quantize(bits, format="log2")])`
`create_student_model`     `lc.make_student`, then `lc.distill`
=========================  =======================================================
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from lightning_compress.analysis.inputs import Source, read
from lightning_compress.analysis.result import Analysis
from lightning_compress.analysis.sweep import analyze
from lightning_compress.analysis.write import prepare, write
from lightning_compress.compress import compress
from lightning_compress.distillation.datafree import distill
from lightning_compress.distillation.student import make_student
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.quantize import Quantize


def compress_model(
    model_path: Source,
    train_students: bool = True,
    analyze_ber_tradeoff: bool = True,
    *,
    output_dir: str | os.PathLike[str] = "compression_results",
    models: str = "all",
    **options: Any,
) -> Analysis:
    """Analyze a model, and write the report with all its files.

    Args:
        model_path: a module, the path of its weights, or a state dict.
        train_students: False leaves students as they are made.
        analyze_ber_tradeoff: whether the text and the figure of errors against ratios are among the files.
        output_dir: where to write; an analysis that was stopped goes on from it.
        models: archives of "all" rows, of the "pareto" front, or "none"; those that a stopped analysis would go on from
            stay in any case.
        **options: of ``analyze``, such as ``model``, ``example_input``, ``pruning_amounts`` or ``ber_thresholds``.

    Returns:
        What was found.

    Raises:
        OSError: ``output_dir`` cannot be written into.
        ValueError: as ``analyze``.

    Examples:
        >>> import os
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        >>> found = compress_model(net, example_input=torch.zeros(1, 64), techniques=["clustered"], combine=False,
        ...                        samples=50, output_dir="results", progress=False)
        >>> [row.name for row in found.rows], "report.html" in os.listdir("results")
        (['clustered_16', 'clustered_64', 'clustered_256'], True)
    """
    folder = prepare(output_dir)
    found = analyze(model_path, train_students=train_students, output_dir=folder, **options)
    write(found, found.workshop.folder, folder, models, ber=analyze_ber_tradeoff)
    return found


class ModelCompressionFramework:
    """One model, and the earlier framework's methods on it; the model itself stays as it is.

    Args:
        model_path: a module, the path of its weights, or a state dict.
        model: the architecture, where ``model_path`` holds weights.
        example_input: one input with its batch axis, for students and for ``compress_model``.
        output_dir: of ``compress_model``.
        seed: of students and of ``compress_model``.

    Raises:
        ValueError: the weights cannot be read or do not fit.

    Examples:
        >>> framework = ModelCompressionFramework(nn.Linear(32, 8), example_input=torch.zeros(1, 32))
        >>> small = framework.apply_magnitude_pruning(0.5)
        >>> int((small.weight == 0).sum())
        128
    """

    def __init__(
        self,
        model_path: Source,
        *,
        model: nn.Module | None = None,
        example_input: Any = None,
        output_dir: str | os.PathLike[str] = "compression_results",
        seed: int = 0,
    ) -> None:
        self.model = read(model_path, model).model
        self.output_dir = output_dir
        self.seed = seed
        self._source, self._architecture, self._example = model_path, model, example_input

    def apply_magnitude_pruning(self, amount: float = 0.5) -> nn.Module:
        """Set the smallest weights of every layer to zero.

        Args:
            amount: share of the weights, in [0, 1).

        Returns:
            A pruned copy.
        """
        return compress(self.model, [Prune(amount, scope="layer")]).model

    def apply_log2_quantization(self, bits: int = 8) -> nn.Module:
        """Round every weight to a power of two.

        Args:
            bits: of a stored weight.

        Returns:
            A quantized copy.
        """
        return compress(self.model, [Quantize(bits, format="log2")]).model

    def create_student_model(self, ratio: float = 0.10, train: bool = True, steps: int = 2000) -> nn.Module:
        """A thinner model, trained on the model's own answers to drawn inputs.

        Args:
            ratio: its share of the parameters, in (0, 1).
            train: False leaves it as it is made.
            steps: optimizer steps.

        Returns:
            The student.
        """
        student = make_student(self.model, ratio, example_input=self._example, seed=self.seed)
        if train:
            options = {"example_input": self._example, "steps": steps, "seed": self.seed}
            student = distill(self.model, student, **options).model
        return student

    def compress_model(
        self, train_students: bool = True, analyze_ber_tradeoff: bool = True, **options: Any
    ) -> Analysis:
        """Try every technique, and write the report; see the function of the same name.

        Args:
            train_students: False leaves students as they are made.
            analyze_ber_tradeoff: whether the text and the figure of errors against ratios are among the files.
            **options: of ``analyze``.

        Returns:
            What was found.
        """
        given = {"model": self._architecture, "example_input": self._example, "seed": self.seed} | options
        return compress_model(
            self._source, train_students, analyze_ber_tradeoff, output_dir=self.output_dir, **given
        )
