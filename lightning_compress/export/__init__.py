"""Files for integer runtimes, compared with the model they came from."""

from lightning_compress.export.report import ExportedLayer, ExportReport
from lightning_compress.export.write import export_onnx

__all__ = ["ExportReport", "ExportedLayer", "export_onnx"]
